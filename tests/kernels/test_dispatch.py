import sys

import pytest
import torch
import torch.nn as nn

from rigsa_kernels import replace_linears
from rigsa_kernels.dispatch import choose_path
from rigsa_kernels.library import on_first_use

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALIGNED, ODD = (64, 128), (64, 2049)


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "tokens", "nf4", "path"),
    [
        (CPU, torch.bfloat16, ALIGNED, 860, False, "gemm"),
        (CPU, torch.bfloat16, ALIGNED, 860, True, "fused"),
        (CUDA, torch.bfloat16, ALIGNED, 860, False, "fused"),
        (CUDA, torch.float16, ALIGNED, 17, False, "fused"),
        (CUDA, torch.bfloat16, ALIGNED, 16, False, "gemm"),
        (CUDA, torch.bfloat16, ALIGNED, 16, True, "fused"),
        (CUDA, torch.bfloat16, ODD, 860, False, "gemm"),
        (CUDA, torch.bfloat16, ODD[::-1], 860, False, "gemm"),
        (CUDA, torch.float32, ALIGNED, 860, False, "gemm"),
        (CUDA, torch.float64, ALIGNED, 860, False, "gemm"),
    ],
)
def test_the_written_rule(device, dtype, shape, tokens, nf4, path):
    assert choose_path(device, dtype, shape, tokens, nf4=nf4) == path


@pytest.mark.parametrize("path", ["fused", "gemm"])
def test_force_overrides_the_rule(path):
    for tokens in (1, 860):
        assert choose_path(CUDA, torch.bfloat16, ALIGNED, tokens, force=path) == path


@pytest.mark.parametrize(
    ("device", "dtype", "nf4", "force", "message"),
    [
        (CPU, torch.bfloat16, False, "fused", "force: 'fused' runs a Triton kernel on CUDA, and the layer is on cpu"),
        (CUDA, torch.float64, False, "fused", "force: 'fused' takes bfloat16, float16 or float32, got float64"),
        (CUDA, torch.bfloat16, True, "gemm", "force: 'gemm' keeps a matrix"),
        (CPU, torch.bfloat16, False, "fast", "force: expected one of fused, gemm or None, got 'fast'"),
    ],
)
def test_a_path_that_cannot_run_is_refused(device, dtype, nf4, force, message):
    with pytest.raises(ValueError, match=message):
        choose_path(device, dtype, ALIGNED, 860, nf4=nf4, force=force)


def test_a_layer_refuses_before_it_computes():
    model = replace_linears(nn.Sequential(nn.Linear(64, 64)), force="fused")
    with pytest.raises(ValueError, match="force: 'fused' runs a Triton kernel on CUDA"):
        model(torch.randn(2, 64))


def test_missing_triton_is_one_clear_error(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("triton", "rigsa_kernels.triton_"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # how an absent package is simulated
    with pytest.raises(RuntimeError, match="triton: needed for rigsa's operators on CUDA and not installed"):
        on_first_use("triton_linear.linear_fwd")(torch.zeros(1))
