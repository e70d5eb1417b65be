"""What has to be the same on a GPU: bits where they are promised, elsewhere results within the bounds of the CPU tests.

``pytest -m gpu`` runs this and, with ``pytest benchmarks -m gpu``, the timings. Without a GPU the same kernels run in
the interpreter (tests/test_triton_*.py).
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from oracle import ALPHAS, DENSITIES, TILES, eager_results, truth
from test_triton_products import DTYPES, check_all, check_whole_numbers, make, whole_numbers

from rigsa.masks import TrainedLayer, prune, random_patterns
from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears, restore_weights, triton_gather
from rigsa_kernels.init import initial_values

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64, 64), (17, 100, 70), (860, 576, 576), (860, 1536, 576), (33, 2049, 130)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_match_float64(shape, density, dtype, exact):
    for alpha in ALPHAS:
        problem = make(*shape, density, alpha, dtype, exact)
        problem.compare(problem.on("cuda").launch())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_tiles_match_float64(shape, density, dtype):
    problem = make(*shape, density, 0.1, dtype)
    problem.compare(problem.on("cuda").launch())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_nf4_products_match_float64(density, exact):
    problem = make(300, 192, 576, density, exact=exact, nf4=True)
    problem.compare(problem.on("cuda").launch())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_exact_sums_are_rounded_once_to_the_nearest(density, exact):
    problem = whole_numbers(density, exact)
    check_whole_numbers(problem, [result.cpu() for result in problem.on("cuda").launch()])


@pytest.mark.parametrize("density", ["dense", "packed", *TILES])
def test_runs_repeat_to_the_bit(density):
    problem = make(860, 576, 576, density).on("cuda")
    first, second = problem.launch(), problem.launch()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_initial_values_have_the_same_bits(density, dtype):
    pattern = make(1, 300, 70, density).pattern
    options = {"bound": 0.1, "seed": 3, "key": 5, "dtype": dtype}
    on_gpu = initial_values(pattern.to("cuda"), device="cuda", **options).cpu()
    assert torch.equal(on_gpu, initial_values(pattern, **options))


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_selection_has_the_same_bits(ranking):
    layers = {}
    for key, name in enumerate("ab"):
        pattern = SparsePattern.dense(50, 100)
        noise = torch.randn(50, 100, generator=torch.Generator().manual_seed(key))
        values = ((initial_values(pattern, 0.5, seed=3, key=key) + noise) * 8).round() / 8  # ties
        layers[name] = TrainedLayer(values, pattern, 0.5, 3, key)
    on_gpu = {
        name: TrainedLayer(layer.values.cuda(), layer.pattern, 0.5, 3, layer.key) for name, layer in layers.items()
    }
    want, counts = prune(layers, keep_fraction=0.8, ranking=ranking)
    got, gpu_counts = prune(on_gpu, keep_fraction=0.8, ranking=ranking)
    assert counts == gpu_counts
    assert all(torch.equal(got[name].to_mask().cpu(), want[name].to_mask()) for name in want)


def test_random_masks_have_the_same_bits():
    drawn = [random_patterns({"a": (60, 70)}, {"a": 99}, seed=4, device=device)["a"] for device in ("cpu", "cuda")]
    assert torch.equal(drawn[0].to_mask(), drawn[1].to_mask().cpu())


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_optimizer_has_the_same_bits(values_dtype, state_dtype):
    """Every operation is rounded correctly, so the kernel stores what PyTorch's code for a CPU stores."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = replace_linears(nn.Sequential(nn.Linear(300, 70)), values_dtype=values_dtype).to(device)
        optimizer = MaskedAdamW(model, state_dtype=state_dtype)
        (layer,) = gated_linears(model).values()
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            layer.rigsa_values.grad = torch.randn(70, 300, generator=generator).to(values_dtype).to(device)
            optimizer.step()
        results.append(layer.rigsa_values.detach().cpu())
    if (values_dtype, state_dtype) == (torch.float32, "float32"):  # on a CPU PyTorch's fused AdamW takes this one
        torch.testing.assert_close(*results)
    else:
        assert torch.equal(*results)


@pytest.mark.parametrize("numerics", ["auto", "exact", "composed"])
@pytest.mark.parametrize("force", ["fused", "gemm", None])
def test_a_model_trains_like_on_the_cpu(force, numerics):
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).bfloat16()
        replace_linears(model, alpha_init=0.1, numerics=numerics, force=force if device == "cuda" else None).to(device)
        optimizer = MaskedAdamW(model, lr=1e-3, weight_decay=0.1)
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
        for _ in range(5):
            loss = (model(x).float() - x.float()).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def packed_model(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16), nn.Tanh(), nn.Linear(96, 64, dtype=torch.bfloat16))
    replace_linears(model, alpha_init=0.1, density=0.2, **options)
    return model.cuda()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("numerics", ["auto", "exact", "composed"])
@pytest.mark.parametrize("kind", ["dense", "packed", "rows", "columns", 16])
def test_a_step_does_not_wait_for_the_device(kind, numerics):
    """PyTorch raises at any synchronisation; the first steps may compile and measure the weights."""
    model = packed_model(numerics=numerics, tile=None if kind in ("dense", "packed") else kind)
    if kind == "dense":
        for layer in gated_linears(model).values():
            layer.set_pattern(SparsePattern.dense(*layer.pattern.shape))
    optimizer, x = MaskedAdamW(model), torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        train_step(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(model, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_free_entries_are_read_and_written_as_on_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in ((50, 100), (300, 70))]
    patterns = [SparsePattern.from_mask(torch.rand(m.shape, generator=generator) < 0.3) for m in matrices]
    for tile in ("rows", "columns", 32):
        tiles = torch.tensor([0, 2, 3], dtype=torch.int32)
        patterns.append(SparsePattern.from_tiles(tiles, (70, 90), tile))
        matrices.append(torch.randn(70, 90, generator=generator).to(dtype))
    values = [torch.randn(pattern.nnz, generator=generator) for pattern in patterns]
    alphas = [torch.rand(1, generator=generator) for _ in patterns]
    results = []
    for device in ("cpu", "cuda"):
        own = [matrix.to(device, copy=True) for matrix in matrices]
        index = [tensor.to(device) for pattern in patterns for tensor in pattern.tensors]
        base = [torch.full((pattern.nnz,), float("nan"), dtype=dtype, device=device) for pattern in patterns]
        torch.ops.rigsa.gather_free_(base, own, index)
        moved = ([tensor.to(device) for tensor in tensors] for tensors in (values, alphas))
        torch.ops.rigsa.compose_free_(own, base, *moved, index)
        composed = [matrix.cpu().clone() for matrix in own]
        torch.ops.rigsa.scatter_free_(own, base, index)
        assert all(torch.equal(matrix.cpu(), before) for matrix, before in zip(own, matrices, strict=True))
        results.append([*(entries.cpu() for entries in base), *composed])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["dense", "packed", "sparse", "empty"])
def test_gradients_from_a_whole_product_match_float64(density, dtype):
    problem = make(860, 576, 130, density, dtype=dtype)
    there = problem.on("cuda")
    results = triton_gather.linear_dvalues(there.dy, there.x, there.values, there.alpha, there.pattern.tensors)
    want, sizes = truth(*problem.arguments)
    eager = eager_results(*problem.arguments, problem.exact)
    check_all([result.cpu() for result in results], want[2:], sizes[2:], eager[2:], dtype)


@pytest.mark.parametrize("tile", [None, "rows", "columns", 16])
@pytest.mark.parametrize("numerics", ["auto", "composed", "exact"])
def test_w0_comes_back_bit_for_bit(numerics, tile):
    model = packed_model(numerics=numerics, tile=tile)
    frozen = [layer.weight.detach().clone() for layer in gated_linears(model).values()]
    optimizer, x = MaskedAdamW(model, lr=1e-2), torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        train_step(model, optimizer, x)
        model.eval()
        with torch.inference_mode():
            y = model(x)
        state = model.state_dict()
        assert torch.equal(copy.deepcopy(model)(x), y)
        model.train()
        for weight, (name, layer) in zip(frozen, gated_linears(model).items(), strict=True):
            assert torch.equal(layer.frozen_matrix(), weight)
            assert torch.equal(state[f"{name}.weight"], weight)
    restore_weights(model)
    assert all(map(torch.equal, frozen, [layer.weight for layer in gated_linears(model).values()]))


def test_a_layer_in_training_is_not_captured_into_a_graph():
    model, x = packed_model(), torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    train_step(model, MaskedAdamW(model), x)
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x)


@pytest.mark.parametrize("density", ["dense", "packed"])
def test_compute_sanitizer_finds_nothing(density):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer (of the CUDA toolkit) is not on the PATH")
    script = "import sys; sys.path.append('..')  # has oracle.py\n"
    script += f"from test_triton_products import make; make(150, 70, 96, {density!r}).on('cuda').launch()"
    command = [sanitizer, "--error-exitcode", "1", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
