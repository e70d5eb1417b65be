"""Who runs: adapted linear layers, adapted models with their optimisers, and optimisers alone, by name.

Every builder returns something ready to time, or raises `UnavailableError` with the reason why it cannot run here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.checks import Problem
from benchmarks.race import UnavailableError
from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern, gated_linears, merge_linears, replace_linears
from rigsa_kernels.select import drawn_units, of_units, top_k
from rigsa_kernels.selection import select_linears

ALPHA = 0.1
"""An open gate, as it stands through most of a training run."""
TICKET = 0.0346
"""Density of the paper's last ticket."""
LORA_RANK = 8
LORA = {"r": LORA_RANK, "lora_alpha": 32}
SPARSE_PRODUCTS = 2e8
"""Products in torch.sparse on a CPU beyond which a forward and backward take a second."""


# One linear layer


@dataclass
class Layer:
    """An adapted linear layer.

    Attributes:
        module: takes x and gives y.
        weight: the matrix it multiplies by, as a differentiable function of its trainable parameters in float64.
        refresh: undoes what an earlier call of the same optimiser step left ready.
        products: 16-bit products one after another on the way through the adapter; each rounds what the next one takes.
    """

    module: nn.Module
    weight: Callable[[dict[str, Tensor]], Tensor]
    refresh: Callable[[], object] = lambda: None
    products: int = 1

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}


def plain_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    return linear


def build_plain(problem: Problem, density: float) -> Layer:
    return Layer(plain_linear(problem.weight), lambda parameters: parameters["weight"])


@lru_cache(maxsize=8)
def ticket_mask(shape: tuple[int, int], density: float, device: torch.device) -> Tensor:
    """The same entries for every provider that lets one choose; of density `density` but for the luck of the draw.

    Nobody may write to it: the next caller gets the same tensor.
    """
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density).to(device)


def composed_product(x: Tensor, weight: Tensor, values: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    return F.linear(x, (weight + alpha * (mask * values)).to(weight.dtype))


class DenseComposition(nn.Module):
    """What one writes first: a dense difference and a boolean mask, composed in every forward."""

    def __init__(self, linear: nn.Linear, mask: Tensor, product: Callable[..., Tensor] = composed_product) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        bound = linear.in_features**-0.5
        self.values = nn.Parameter(torch.empty(mask.shape, device=mask.device).uniform_(-bound, bound))
        self.alpha = nn.Parameter(torch.full((1,), ALPHA, device=mask.device))
        self.register_buffer("mask", mask)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.values, self.mask, self.alpha)


compiled_product = torch.compile(composed_product, fullgraph=True, dynamic=True)


def build_dense(problem: Problem, density: float, product: Callable[..., Tensor] = composed_product) -> Layer:
    mask = ticket_mask(problem.shape, density, problem.x.device)
    module = DenseComposition(plain_linear(problem.weight), mask, product)
    if product is not composed_product:
        try:
            module(problem.x[:2])
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UnavailableError(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
    return Layer(module, lambda own: problem.weight.double() + own["alpha"] * mask * own["values"])


class SparseComposition(nn.Module):
    """torch.sparse: a second product with a CSR matrix, which a CPU has in float32 only."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        bound = linear.in_features**-0.5
        self.values = nn.Parameter(torch.empty(int(mask.sum()), device=mask.device).uniform_(-bound, bound))
        self.alpha = nn.Parameter(torch.full((1,), ALPHA, device=mask.device))
        self.register_buffer("columns", mask.nonzero()[:, 1].contiguous())
        self.register_buffer("row_pointers", F.pad(mask.sum(1).cumsum(0), (1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            delta = torch.sparse_csr_tensor(self.row_pointers, self.columns, self.values, self.weight.shape)
        term = self.alpha * torch.sparse.mm(delta, x.float().t()).t()
        return (F.linear(x, self.weight) + term).to(x.dtype)


def build_sparse(problem: Problem, density: float) -> Layer:
    products = density * problem.weight.numel() * len(problem.x)
    if problem.x.device.type == "cpu" and products > SPARSE_PRODUCTS:
        raise UnavailableError(f"{products:.1e} products in torch.sparse take too long on a CPU")
    mask = ticket_mask(problem.shape, density, problem.x.device)

    def weight(own: dict[str, Tensor]) -> Tensor:
        delta = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        return problem.weight.double() + own["alpha"] * delta.masked_scatter(mask, own["values"])

    return Layer(SparseComposition(plain_linear(problem.weight), mask), weight)


class _Holder(nn.Module):
    """PEFT adapts the children of a module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = plain_linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _peft() -> object:
    try:
        import peft
    except ImportError as error:
        raise UnavailableError(f"PEFT: {error}; pip install peft") from error
    return peft


def _adapted(problem: Problem, config: object, **options: bool) -> nn.Module:
    """The layer that PEFT makes, with an adapter that has left its initial zero."""
    layer = _peft().get_peft_model(_Holder(problem.weight), config, **options).base_model.model.linear
    generator = torch.Generator(problem.weight.device).manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01, generator=generator)
    return layer


def build_lora(problem: Problem, density: float, **options: bool) -> Layer:
    layer = _adapted(problem, _peft().LoraConfig(target_modules=["linear"], **LORA), **options)
    scale = layer.scaling["default"]

    def weight(own: dict[str, Tensor]) -> Tensor:
        a, b = (own[f"lora_{name}.default.weight"] for name in "AB")
        return problem.weight.double() + scale * b @ a

    return Layer(layer, weight, products=2)


def build_shira(problem: Problem, density: float) -> Layer:
    rows, columns = problem.weight.shape
    rank = round(density * rows * columns / (rows + columns))
    if rank * (rows + columns) > rows * columns or density == 1:
        raise UnavailableError("PEFT SHiRA: a sparse adapter only, at most r = min(m n / (m + n))")
    layer = _adapted(problem, _peft().ShiraConfig(r=rank, target_modules=["linear"]))
    indices = layer.shira_indices["default"].long()

    def weight(own: dict[str, Tensor]) -> Tensor:
        return problem.weight.double().index_put(tuple(indices), own["shira_weight.default"], accumulate=True)

    return Layer(layer, weight)


def build_supertuning(problem: Problem, density: float) -> Layer:
    layer = _adapted(problem, _peft().SupertuningConfig(sparsity=1 - density, target_modules=["linear"]))
    indices = layer.supertuning_indices["default"].long()

    def weight(own: dict[str, Tensor]) -> Tensor:
        flat = problem.weight.double().flatten()
        return flat.scatter_add(0, indices, own["supertuning_values.default"]).view_as(problem.weight)

    return Layer(layer, weight)


def ticket_tiles(shape: tuple[int, int], density: float, tile: str | int, device: torch.device) -> SparsePattern:
    """Whole tiles at random, of this density but for the rounding of their number."""
    units = drawn_units(shape, tile, seed=0, key=0)
    count = max(round(density * units.pattern.nnz), 1)
    return of_units(top_k({"": units}, count)[""], shape, tile).to(device)


def build_ours(
    problem: Problem, density: float, *, fresh: bool = True, tile: str | int | None = None, **options: object
) -> Layer:
    pattern = SparsePattern.dense(*problem.weight.shape)
    if tile is not None:
        pattern = ticket_tiles(problem.shape, density, tile, problem.x.device)
    elif density < 1:
        pattern = SparsePattern.from_mask(ticket_mask(problem.shape, density, problem.x.device))
    module = GatedSparseLinear(
        plain_linear(problem.weight), seed=0, key=0, pattern=pattern, alpha_init=ALPHA, **options
    )
    if options.get("force") == "fused" and problem.x.device.type != "cuda":
        raise UnavailableError("the fused kernel needs a CUDA device")

    def weight(own: dict[str, Tensor]) -> Tensor:
        return problem.weight.double() + own["rigsa_alpha"] * pattern.scatter(own["rigsa_values"])

    def forget() -> None:
        torch.autograd.graph.increment_version([module.rigsa_values])

    return Layer(module, weight, forget if fresh else lambda: None)


FLOOR = "nn.Linear"
LAYERS: dict[str, Callable[[Problem, float], Layer]] = {
    FLOOR: build_plain,
    "dense, eager": build_dense,
    "dense, torch.compile": partial(build_dense, product=compiled_product),
    "torch.sparse": build_sparse,
    "PEFT LoRA": build_lora,
    "PEFT LoRA, bf16": partial(build_lora, autocast_adapter_dtype=False),
    "PEFT SHiRA": build_shira,
    "PEFT Super-Tuning": build_supertuning,
    "ours, composed": partial(build_ours, numerics="composed", force="gemm"),
    "ours, exact": partial(build_ours, numerics="exact", force="gemm"),
    "ours, composed, fused": partial(build_ours, numerics="composed", force="fused"),
    "ours, exact, fused": partial(build_ours, numerics="exact", force="fused"),
}
LATER = {
    "ours, composed, later micro-batch": partial(build_ours, fresh=False, numerics="composed", force="gemm"),
    "ours, exact, later micro-batch": partial(build_ours, fresh=False, numerics="exact", force="gemm"),
}
"""Forward finds the matrix of the step where an earlier micro-batch left it."""


# A whole model


@dataclass
class Trainee:
    """An adapted model, its optimiser, and the differences ``{layer: alpha * D}`` that it starts from (none: zero)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    deltas: Callable[[], dict[str, Tensor]] = dict

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def state(self) -> list[Tensor]:
        """The optimiser's; empty before its first step."""
        values = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [value for value in values if isinstance(value, Tensor)]


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters: frozen weights stand in memory once."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def model_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return select_linears(model, "*", ())[0]


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    """Gives the linear layers trainable copies of their weights, which other contestants read."""
    linears = model_linears(model).values()
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    return [linear.weight for linear in linears]


def fused_adamw(parameters: list[nn.Parameter], **options: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **options)


def adamw_8bit(parameters: list[nn.Parameter], **options: float) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnavailableError(f"bitsandbytes: {error}; pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def tune_fully(model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer] = fused_adamw) -> Trainee:
    return Trainee(model, optimizer(own_weights(model)))


class NoUpdate(torch.optim.Optimizer):
    """Drops gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters or [nn.Parameter(torch.zeros(1))], {})

    def step(self, closure: object = None) -> None:
        pass


def pass_through(model: nn.Module) -> Trainee:
    """What any adapter of all layers has to do: forward, and the gradient down to the first layer. Trains nothing."""
    model.enable_input_require_grads()
    return Trainee(model, NoUpdate([]))


def tune_dense_composition(model: nn.Module, density: float) -> Trainee:
    layers = {}
    for name, linear in model_linears(model).items():
        mask = ticket_mask(tuple(linear.weight.shape), density, linear.weight.device)
        layers[name] = DenseComposition(linear, mask)
        model.set_submodule(name, layers[name])

    def deltas() -> dict[str, Tensor]:
        return {name: (layer.alpha * layer.mask * layer.values).detach() for name, layer in layers.items()}

    trained = [parameter for layer in layers.values() for parameter in (layer.values, layer.alpha)]
    return Trainee(model, fused_adamw(trained), deltas)


def tune_gated(
    model: nn.Module, density: float | None = None, tile: str | int | None = None, **options: object
) -> Trainee:
    if options.get("force") == "fused" and next(model.parameters()).device.type != "cuda":
        raise UnavailableError("the fused kernel needs a CUDA device")
    if density is not None:  # a ticket composes into its weights
        own_weights(model)
    replace_linears(model, alpha_init=ALPHA, **options)
    if density is not None:
        for layer in gated_linears(model).values():
            shape, device = layer.pattern.shape, layer.weight.device
            pattern = SparsePattern.from_mask(ticket_mask(shape, density, device)) if tile is None else None
            layer.set_pattern(pattern or ticket_tiles(shape, density, cast(str | int, tile), device))

    state_dtype = "bfloat16" if options.get("values_dtype") is torch.bfloat16 else "float32"
    return Trainee(model, MaskedAdamW(model, state_dtype=state_dtype), _gated_deltas(model))


def _gated_deltas(model: nn.Module) -> Callable[[], dict[str, Tensor]]:
    layers = gated_linears(model)
    return lambda: {name: layer.rigsa_alpha.detach() * layer.delta().float() for name, layer in layers.items()}


def merge_ticket(model: nn.Module) -> Trainee:
    """A ticket that has become weights: it generates, and trains no more."""
    ticket = TRAINEES[TICKET_NAME](model)
    return Trainee(merge_linears(model), NoUpdate([]), ticket.deltas)


def tune_with_peft(model: nn.Module, kind: str, density: float | None = None, **options: bool) -> Trainee:
    peft, linears = _peft(), model_linears(model)
    targets = sorted({name.rpartition(".")[2] for name in linears})
    if kind == "LoRA":
        config = peft.LoraConfig(target_modules=targets, **LORA)
    elif kind == "SHiRA":
        weights = sum(linear.weight.numel() for linear in linears.values())
        sides = sum(sum(linear.weight.shape) for linear in linears.values())
        config = peft.ShiraConfig(r=round(density * weights / sides), target_modules=targets)
    else:
        config = peft.SupertuningConfig(sparsity=1 - density, target_modules=targets)
    adapted = peft.get_peft_model(model, config, **options)
    return Trainee(adapted, fused_adamw([own for own in adapted.parameters() if own.requires_grad]))


FULL = "full fine-tuning"
TICKET_NAME, LEVEL_0, MERGED = "ours, 3.46 %", "ours, level 0", "ours, 3.46 %, merged"
ROWS, COLUMNS, TILES_32 = "ours, 3.46 % in rows", "ours, 3.46 % in columns", "ours, 3.46 % in tiles of 32"
LEVEL_0_HALF = "ours, level 0, bf16 values"
LORA_DEFAULT, LORA_16, SHIRA = "PEFT LoRA", "PEFT LoRA, bf16", "PEFT SHiRA, 3.46 %"
FROZEN, GRADIENTS = "frozen model", "frozen model and whole gradients"
TRAINEES: dict[str, Callable[[nn.Module], Trainee]] = {  # in the order of their heats: neighbours race each other
    FULL: tune_fully,
    TICKET_NAME: partial(tune_gated, density=TICKET, numerics="composed"),
    LORA_16: partial(tune_with_peft, kind="LoRA", autocast_adapter_dtype=False),
    FROZEN: pass_through,
    ROWS: partial(tune_gated, density=TICKET, tile="rows", numerics="composed"),
    TILES_32: partial(tune_gated, density=TICKET, tile=32, numerics="composed"),
    COLUMNS: partial(tune_gated, density=TICKET, tile="columns", numerics="composed"),
    GRADIENTS: partial(tune_fully, optimizer=NoUpdate),
    LORA_DEFAULT: partial(tune_with_peft, kind="LoRA"),
    SHIRA: partial(tune_with_peft, kind="SHiRA", density=TICKET),
    "PEFT Super-Tuning, 3.46 %": partial(tune_with_peft, kind="Super-Tuning", density=TICKET),
    "ours, 3.46 %, exact": partial(tune_gated, density=TICKET, numerics="exact"),
    LEVEL_0: partial(tune_gated, numerics="composed"),
    LEVEL_0_HALF: partial(tune_gated, numerics="composed", values_dtype=torch.bfloat16),
    "ours, 43 %": partial(tune_gated, density=0.43, numerics="composed"),
    "ours, level 0, exact": partial(tune_gated, numerics="exact"),
    "dense composition, 3.46 %": partial(tune_dense_composition, density=TICKET),
    "full fine-tuning, bitsandbytes 8-bit": partial(tune_fully, optimizer=adamw_8bit),
}


# Optimisers alone


def ours(parameters: list[nn.Parameter], state_dtype: str) -> torch.optim.Optimizer:
    return MaskedAdamW([{"params": parameters}], state_dtype=state_dtype)


Optimizer = tuple[torch.dtype, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]
OPTIMIZERS: dict[str, Optimizer] = {
    "torch.optim.AdamW(fused)": (torch.float32, fused_adamw),
    "torch.optim.AdamW(fused), bf16": (torch.bfloat16, fused_adamw),
    "bitsandbytes AdamW8bit": (torch.float32, adamw_8bit),
    "bitsandbytes AdamW8bit, bf16": (torch.bfloat16, adamw_8bit),
    "ours": (torch.float32, partial(ours, state_dtype="float32")),
    "ours, bf16": (torch.bfloat16, partial(ours, state_dtype="float32")),
    "ours, bf16, bf16 moments": (torch.bfloat16, partial(ours, state_dtype="bfloat16")),
    "ours, bf16, int8 moments": (torch.bfloat16, partial(ours, state_dtype="int8")),
}
"""Dtype of the parameters, and how to make the optimiser."""
