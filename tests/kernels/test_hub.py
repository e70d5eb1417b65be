"""The folder hub/ has the layout of the kernels hub, and what is built of it is loaded beside the installed package."""

import ast
import importlib.util
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import rigsa_kernels

HUB = Path(__file__).resolve().parents[2] / "hub"
BUILD = tomllib.loads((HUB / "build.toml").read_text())
NAME = BUILD["general"]["name"].replace("-", "_")
OPS = """
import torch
_OPS_NAME = "{name}"
ops = getattr(torch.ops, _OPS_NAME)

def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
"""
"""The file that kernel-builder writes over `rigsa_kernels/_ops.py`, as far as the package uses it."""


def test_the_folder_is_what_kernel_builder_takes():
    assert set(BUILD) == {"general", "torch-noarch"}
    assert set(BUILD["general"]) == {"name", "version", "edition", "license", "backends"}
    assert set(BUILD["general"]["backends"]) <= {"cpu", "cuda", "rocm", "xpu", "metal"}
    assert type(BUILD["general"]["version"]) is int
    assert BUILD["general"]["edition"] == 5
    package = HUB / "torch-ext" / NAME
    assert (package / "__init__.py").samefile(rigsa_kernels.__file__)
    assert not (package / NAME).exists()
    assert {"flake.nix", "CARD.md"} <= {path.name for path in HUB.iterdir()}
    assert "layers" in rigsa_kernels.__all__


def test_layers_are_a_forward_pass_alone():
    """No constructor, no state, and no class variable but the two that the hub allows."""
    tree = ast.parse((HUB / "torch-ext" / NAME / "layers.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes
    for node in classes:
        assert issubclass(getattr(rigsa_kernels.layers, node.name), nn.Module)
        assert [part.name for part in node.body if isinstance(part, ast.FunctionDef)] == ["forward"]
        given = [part for part in node.body if isinstance(part, ast.Assign)]
        given += [part for part in node.body if isinstance(part, ast.AnnAssign) and part.value is not None]
        assert {part.target.id for part in given} <= {"has_backward", "can_torch_compile"}


@pytest.fixture
def built(tmp_path):
    """The variant for a CPU, loaded as the library `kernels` loads it: under a name that is that build's alone."""
    namespace = f"_{NAME}_cpu_1234567"
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(
        HUB / "torch-ext" / NAME, variant, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "py.typed")
    )
    (variant / "_ops.py").write_text(OPS.format(name=namespace))
    metadata = {"id": namespace, "name": BUILD["general"]["name"], "version": 0, "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    spec = importlib.util.spec_from_file_location(f"{NAME}_1234567", variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == spec.name]:
        del sys.modules[name]


def test_a_build_computes_what_the_package_computes_and_shares_nothing_with_it(built):
    def adapted(package):
        torch.manual_seed(0)
        model = package.replace_linears(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), density=0.5)
        optimizer = package.MaskedAdamW(model, lr=1e-2)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    x = torch.randn(3, 12)
    ours, theirs = adapted(rigsa_kernels), adapted(built)
    assert torch.equal(ours(x), theirs(x))
    layer = theirs[0]
    assert type(layer).__module__ == f"{built.__name__}.linear"
    assert not isinstance(layer, rigsa_kernels.GatedSparseLinear)
    assert Path(sys.modules[type(layer).__module__].__file__).parent == Path(built.__file__).parent
    assert hasattr(torch.ops._rigsa_kernels_cpu_1234567, "linear_fwd")
    expected = layer(x)
    built.restore_weights(theirs)  # the pass composed into the weight
    torch.testing.assert_close(built.layers.GatedLinear.forward(layer, x), expected)
    compiled = torch.compile(lambda x: built.layers.GatedLinear.forward(layer, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
