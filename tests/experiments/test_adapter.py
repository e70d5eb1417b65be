"""What the rig writes down about a model does not depend on when it is asked."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import make_llama
from rigsa.errors import RigsaError
from rigsa.experiments.adapter import base_fingerprint, load_adapter, save_adapter
from rigsa.tensor_files import write_tensors
from rigsa_kernels import SparsePattern, gated_linears, replace_linears


def test_the_base_has_one_fingerprint_before_and_after_a_pass():
    """A ticket composes into its weights for a pass."""
    model = replace_linears(make_llama(), density=0.3, alpha_init=0.5)
    before = base_fingerprint(model)
    model(torch.tensor([[1, 2, 3]]))
    assert base_fingerprint(model) == before


def test_values_go_to_the_entries_that_they_belong_to(tmp_path):
    """A mask of equal size is another one, also of one layer, and of tiles."""
    path = tmp_path / "adapter.safetensors"

    def ticket(seed=0, **options):  # type: ignore[no-untyped-def]
        return replace_linears(make_llama(), density=0.25, seed=seed, **options)

    model = ticket()
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.normal_()
    save_adapter(model, path)
    same, name = ticket(), "model.layers.1.mlp.up_proj"
    load_adapter(same, path)
    for layer, other in zip(gated_linears(model).values(), gated_linears(same).values(), strict=True):
        assert torch.equal(layer.rigsa_values, other.rigsa_values)
    pattern = gated_linears(ticket(seed=1))[name].pattern
    gated_linears(same)[name].set_pattern(pattern)
    for wrong in (same, ticket(seed=1), ticket(tile=4)):
        before = [layer.rigsa_values.clone() for layer in gated_linears(wrong).values()]
        with pytest.raises(RigsaError, match="does not fit: its values belong to another mask than the model's layers"):
            load_adapter(wrong, path)
        assert all(map(torch.equal, before, [layer.rigsa_values for layer in gated_linears(wrong).values()]))


@pytest.mark.parametrize("tile", [4, "2x8", "rows", "columns"])
def test_values_of_tiles_lie_as_those_of_single_entries(tile):
    """So a file need not say which tiles its values were trained in: the entries tell where they belong."""
    pattern = next(iter(gated_linears(replace_linears(make_llama(), density=0.25, tile=tile)).values())).pattern
    values = torch.arange(1.0, pattern.nnz + 1)
    assert torch.equal(pattern.scatter(values), SparsePattern.from_mask(pattern.to_mask()).scatter(values))


def test_an_adapter_of_an_earlier_version_names_no_mask(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = replace_linears(make_llama(), density=0.25)
    save_adapter(model, path)
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["rigsa"])
    assert head.pop("mask")
    write_tensors(path, load_file(path), {"rigsa": json.dumps(head)})
    load_adapter(model, path)
    write_tensors(path, load_file(path), {"rigsa": json.dumps(head | {"masj": "0"})})
    with pytest.raises(RigsaError, match=r"is damaged .its head names 'masj'"):
        load_adapter(model, path)
