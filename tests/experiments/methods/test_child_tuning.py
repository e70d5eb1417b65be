"""Child-Tuning: what a step keeps of the gradients, and that keeping all of them is full fine-tuning."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rigsa.experiments.adapter import load_masks
from rigsa.experiments.methods import thin_gradients
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.methods.thin_gradients import thin_out
from rigsa.run import main
from tests.experiments.methods.test_methods import command, config_of, experiment


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_gradients_are_divided_by_the_share_or_zero(share, monkeypatch):
    monkeypatch.setattr(thin_gradients, "CHUNK", 1000)
    gradients = [torch.full((50, 80), 2.0), torch.full((4000,), 3.0)]
    thin_out(gradients, share, seed=1, step=7)
    for gradient, before in zip(gradients, (2.0, 3.0), strict=True):
        kept = gradient != 0
        assert torch.equal(gradient[kept], torch.full_like(gradient[kept], before) * (torch.ones(()) / share))
        assert abs(kept.float().mean().item() - share) <= 4 * math.sqrt(share * (1 - share) / 4000)
    if share < 1:
        assert not torch.equal(gradients[0].view(-1) != 0, gradients[1] != 0)


def test_a_draw_depends_on_seed_and_step_alone():
    def kept(seed: int, step: int) -> torch.Tensor:
        gradients = [torch.ones(1000)]
        thin_out(gradients, 0.5, seed, step)
        return gradients[0] != 0

    assert torch.equal(kept(3, 5), kept(3, 5))
    draws = {tuple(kept(seed, step).tolist()) for seed in range(3) for step in range(3)}
    assert len(draws) == 9
    thin_out([], 0.5, 0, 0)


def adapters(method: str, model: Path, out: Path, **options: object) -> dict[str, torch.Tensor]:
    assert main(command(config_of(method, model, **options), out)) == 0
    return load_file(max(out.glob("level_*")) / "adapter.safetensors")


def test_by_all_gradients_it_is_full_fine_tuning(small_model_folder, tmp_path):
    full = adapters("full", small_model_folder, tmp_path / "full", drift=False)
    whole = adapters("child-f", small_model_folder, tmp_path / "whole", drift=False, gradient_share=1.0)
    one_step = {"drift": False, "gradient_share": 0.1, "max_steps": 1, "warmup_steps": 0}
    part = adapters("child-f", small_model_folder, tmp_path / "part", **one_step)
    assert all(torch.equal(full[name], whole[name]) for name in full)
    for values in part.values():  # after one step of Adam, those that had a gradient have moved
        assert abs((values != 0).float().mean() - 0.1) < 0.05


def test_the_task_driven_mask_is_the_fisher_mask_over_all_layers(small_model_folder, tmp_path):
    for method, ranking in (("child-d", "global"), ("fisher", "layer")):
        assert METHODS[method].usual.get("ranking", "layer") == ranking
        adapters(method, small_model_folder, tmp_path / method, drift=False, ranking="global", density=0.7)
    prepared = experiment("child-d", small_model_folder, tmp_path / "child-d")
    one, other = (load_masks(prepared.model, tmp_path / method / "level_1" / "mask.safetensors")
                  for method in ("child-d", "fisher"))  # fmt: skip
    assert all(torch.equal(one[name].words, other[name].words) for name in one)
    assert len({pattern.nnz for pattern in one.values()}) > 3


def test_its_gradients_cannot_be_freed_in_backward(small_model_folder):
    config = config_of("child-f", small_model_folder, max_grad_norm=0.0, micro_batch_size=4)
    with pytest.raises(Exception, match="--step-in-backward: expected no for child-f"):
        dataclasses.replace(config, step_in_backward=True)
