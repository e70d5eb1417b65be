"""`GatedSparseLinear`: a frozen linear layer plus a gated sparse difference."""

from __future__ import annotations

import logging
import math
import sys
import weakref
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import ops
from ._ops import ops as operators
from .dispatch import GENERATION_TOKENS, HALF_DTYPES, Path, choose_path, kernels_win
from .exactness import composed_is_safe, need_two_products, rms
from .format import SparsePattern, carry
from .in_place import InPlaceWeight, Peers, optimizer_steps, restore
from .init import initial_values
from .nf4 import SCALES, dequantize, is_nf4_linear, load_scales, nf4_base, scales_of
from .roles import has_left
from .snapshot import Snapshot

logger = logging.getLogger(__name__)

Numerics = Literal["auto", "exact", "composed"]
ALPHA_INIT = 1e-6
"""The gate's initial value (RIGSA, section 3)."""
DERIVED = ("rigsa_word_offsets", "rigsa_row_base")
"""What follows from a pattern's bit mask: older state dicts hold it, and nobody reads it."""
INDICES = ("rigsa_words", "rigsa_tiles", "rigsa_tile")
"""What a state dict holds of a pattern."""
NO_CAPTURE = (
    "CUDA graph: a layer in training cannot be captured, as its matrix is made outside the graph and a replay would "
    "use an old one; capture in evaluation mode, or train without a graph"
)
_claims: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""A weight, and a weak reference to the layer that composes it in place."""


_starts = 0


def layer_starts() -> int:
    """How often any layer was made, moved or loaded, or took another pattern: what is known of layers holds between."""
    return _starts


def is_plain_linear(module: nn.Module) -> bool:
    """An ``nn.Linear`` that computes what it says: no packed weight, no other forward, no weight made of others."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "weight" in module._parameters
        and module.weight.is_floating_point()
        and tuple(module.weight.shape) == (module.out_features, module.in_features)
    )


def _pattern_in(state_dict: dict[str, Tensor], prefix: str, shape: tuple[int, int]) -> SparsePattern:
    """The pattern that a layer's state holds: its tiles, its bit mask, or neither when dense."""
    tiles, tile, words = (state_dict.get(f"{prefix}rigsa_{name}") for name in ("tiles", "tile", "words"))
    if tiles is not None and tile is not None:
        return SparsePattern.from_tiles(tiles, shape, (int(tile[0]), int(tile[1])))
    return SparsePattern.dense(*shape) if words is None else SparsePattern.from_words(words, shape[1])


@dataclass(slots=True, frozen=True)
class _Way:
    """How a layer computes, and what that decision rests on.

    The way of the last call serves the next one as long as nothing has changed that it rests on: the parameters, the
    layer's settings (`SETTINGS`, whose changes `GatedSparseLinear.__setattr__` sees), the optimisers' steps, the dtype
    of x, autocast and, where a path depends on that, whether there are few tokens. In generation the weights of a whole
    model pass through the cache between two calls, so all that a call asks for is here, in one object.

    Attributes:
        steps: of any optimiser, when it was found.
        x_dtype, device_type: of x.
        autocast: the dtype under autocast; None where that is off.
        fewest, most: numbers that x may have.
        enabled: whether the adapter counts.
        dtype: of the products.
        exact: two products or one; a flag on the device where a fused kernel decides.
        operand: the matrix to multiply by; None for the fused kernel.
        base: the frozen weight as operators take it; empty where `operand` says it all.
        columns: those of x that the gradient needs, where they are worth keeping alone (`keeps_columns`).
    """

    made_from: Snapshot
    steps: int
    x_dtype: torch.dtype
    device_type: str
    autocast: torch.dtype | None
    fewest: int
    most: int
    enabled: bool
    dtype: torch.dtype
    exact: bool | Tensor
    operand: Tensor | None
    base: list[Tensor]
    pattern: list[Tensor]
    columns: ops.Columns | None

    def serves(self, x: Tensor, weight: Tensor, values: Tensor, alpha: Tensor) -> bool:
        """Whether it is the way of these, too, where the layer's settings are what they were."""
        return (
            self.x_dtype == x.dtype
            and self.steps == optimizer_steps()
            and self.fewest <= x.numel() <= self.most
            and self.autocast == _autocast(self.device_type)
            and self.made_from.is_of_three(weight, values, alpha)
        )


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype under autocast; None where that is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


SETTINGS = frozenset(("enabled", "numerics", "force", "in_place", "training", "exact_in_training"))
"""Attributes of a layer that decide how it computes."""


class GatedSparseLinear(nn.Module):
    """``y = x W0^T + alpha * x (m . D)^T + b``: W0 and b frozen, D's free entries and the gate alpha trained.

    It takes the place of an ``nn.Linear`` (or of a bitsandbytes ``Linear4bit`` in NF4) and shares its weight and bias.
    Trainable parameters carry the prefix ``rigsa_``: `rigsa_values` holds the free entries (``[N, K]`` while the
    pattern is dense, else ``[nnz]``) and `rigsa_alpha` the gate, shape ``(1,)``. Entries outside the pattern are
    not stored, so nothing can move them.

    Args:
        linear: the layer to adapt; its parameters are frozen and kept by reference.
        seed: of the initial values, 0 to 2**64 - 1.
        key: the layer's number in the random stream: `rigsa_kernels.init.layer_key` of its name.
        pattern: where D may be non-zero; dense by default.
        alpha: a gate to share with other layers; one of its own by default.
        alpha_init: the gate's initial value.
        init_scale: initial values are uniform in +-init_scale / sqrt(in_features).
        values_dtype: of `rigsa_values`; float32 by default (float64 beside a float64 weight), because in bfloat16 a
            small update rounds to nothing unless the optimiser rounds stochastically (`MaskedAdamW` does).
        numerics: ``"exact"`` (two products), ``"composed"`` (one, over the rounded sum) or ``"auto"``: composed where
            that keeps the adapter (`composed_is_safe`), which is always in float32 and float64. In bfloat16 and float16
            `auto` decides once a step on a CPU. On a GPU a fused kernel decides by itself; elsewhere the host decides
            in evaluation mode, and in training, where it must not wait for the device, goes by what `MaskedAdamW` has
            found (exact until then, and with other optimisers).
        force: ``"fused"`` or ``"gemm"`` in place of the rule in `rigsa_kernels.dispatch`.
        in_place: whether a packed pattern may be composed into the weight itself (`rigsa_kernels.in_place`). False
            keeps `weight` as it is at any moment, for a base whose weights other modules read, and costs a second
            matrix.

    Raises:
        ValueError: `linear` is neither of the two, or an argument is out of range; in `forward`, `force` names a path
            that cannot run there.

    With a packed pattern, `weight` holds ``W0 + alpha * D`` from a pass until the optimiser's next step or
    `restore_weight`. `frozen_matrix`, state dicts and copies show W0 at any time. On the other paths the matrix that
    every call of a step needs is made once and kept until an optimiser steps or a parameter changes (a write through
    ``.data`` outside an optimiser is not seen, nor one to a weight that was made in inference mode). It is not part of
    the state dict.

    Where `enabled` is set to False, the layer is the frozen one alone; nothing that is trained or saved changes.
    """

    enabled: bool = True
    _pattern: SparsePattern
    bias: Tensor | None
    rule_device: torch.device | None = None
    """The device by whose rule a path is chosen; None for the operands'. For plans of a device that is not there: set
    it before an optimiser is made."""
    pattern_note: object = None
    """What somebody wrote down about the present pattern. A new pattern clears it."""
    waiting: bool = False
    """Whether another adapter of the same weight is in use. `gated_linears` passes a layer that waits over."""
    exact_in_training: bool = True
    """What `auto` goes by in training on a GPU, where the host must not ask. `MaskedAdamW` sets it."""

    def __init__(
        self,
        linear: nn.Linear,
        *,
        seed: int,
        key: int,
        pattern: SparsePattern | None = None,
        alpha: nn.Parameter | None = None,
        alpha_init: float = ALPHA_INIT,
        init_scale: float = 1.0,
        values_dtype: torch.dtype | None = None,
        numerics: Numerics = "auto",
        force: Path | None = None,
        in_place: bool = True,
    ) -> None:
        super().__init__()
        self.is_nf4 = is_nf4_linear(linear)
        if not self.is_nf4 and not is_plain_linear(linear):
            raise ValueError(f"linear: expected an nn.Linear with a floating-point or NF4 weight, got {linear}")
        if self.is_nf4:
            nf4_base(linear.weight)  # refuses a shape that cannot be decoded
        if force is not None and force not in get_args(Path):
            raise ValueError(f"force: expected one of {', '.join(get_args(Path))} or None, got {force!r}")
        if numerics not in get_args(Numerics):
            raise ValueError(f"numerics: expected one of {', '.join(get_args(Numerics))}, got {numerics!r}")
        if not math.isfinite(alpha_init):
            raise ValueError(f"alpha_init: expected a finite number, got {alpha_init}")
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.seed, self.key, self.numerics, self.force, self.in_place = seed, key, numerics, force, in_place
        self.alpha_init, self.bound = alpha_init, init_scale / math.sqrt(linear.in_features)
        self._hold(linear)
        self._start()
        self.join(Peers())
        combine_dtype = torch.promote_types(self.dtype, torch.float32)
        self._values_dtype = values_dtype or combine_dtype
        if alpha is None:
            with torch.inference_mode(False):  # as the values
                alpha = nn.Parameter(torch.empty(1, dtype=combine_dtype, device=self.weight.device))
        self.rigsa_alpha = alpha
        self.set_pattern(pattern or SparsePattern.dense(self.out_features, self.in_features))

    def _hold(self, linear: nn.Linear) -> None:
        """Freeze weight and bias, and keep them by reference."""
        self.weight = linear.weight.requires_grad_(False)
        self.register_parameter("bias", None if linear.bias is None else linear.bias.requires_grad_(False))  # type: ignore[arg-type]
        self._origin = (linear,)  # in a tuple, or it would be a submodule

    def _start(self) -> None:
        """Nothing is composed, and no way is known."""
        global _starts
        _starts += 1
        self.in_place_weight: InPlaceWeight | None = None
        self._way: _Way | None = None
        self._ready: _Way | None = None  # the same, until a setting changes
        self._base_kept: tuple[Snapshot, torch.dtype, list[Tensor]] | None = None
        self._weight_rms: tuple[Snapshot, Tensor] | None = None
        self._threshold: tuple[torch.dtype, Tensor] | None = None
        self._flag: tuple[torch.dtype, Snapshot, Tensor] | None = None
        self._was_exact: bool | None = None
        # FSDP and functional_call put another tensor in the weight's place for a pass, which must not be written to.
        self._home = weakref.ref(self.weight)

    def join(self, peers: Peers) -> None:
        """Be composed and restored together with the layers of `peers`."""
        self._peers = peers
        peers.join(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: the weight's; behind NF4, that of the weight before it was quantised."""
        return self.weight.quant_state.dtype if self.is_nf4 else self.weight.dtype  # type: ignore[attr-defined]

    @property
    def num_weights(self) -> int:
        """N * K."""
        return self.out_features * self.in_features

    def restored(self) -> nn.Linear:
        """The linear layer that was adapted, with its present weight and bias."""
        self.restore_weight()
        (linear,) = self._origin
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def release_origin(self) -> None:
        """Have the layer that was adapted let go of weight and bias, which would stay whole beside shards (FSDP2).

        `restored` gives it the present ones.
        """
        (linear,) = self._origin
        linear.weight = linear.bias = None  # type: ignore[assignment]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer, frozen, that multiplies by ``W0 + alpha * D`` in `dtype`, as this one does where it composes.

        Its weight is a new one; the bias is shared. Whether rounding the sum loses the adapter is `merging_loses`.

        Raises:
            ValueError: W0 is in four bits, which have no room for a difference.
        """
        if self.is_nf4:
            raise ValueError(
                "merged: W0 is in four bits, which have no room for a difference; load it in 16 or 32 bits"
            )
        weight = self._composed(self.frozen_matrix())
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")  # draws no weight
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @torch.no_grad()
    def merging_loses(self) -> bool:
        """Whether rounding ``W0 + alpha * D`` to `dtype` takes away more of an adapter than this layer's forward does.

        Never where `numerics` is "composed", in float32 and float64, or where nothing is to be added: a closed gate.
        """
        if self.numerics == "composed" or self.dtype not in HALF_DTYPES:
            return False
        return bool(self.rigsa_alpha * rms(self.rigsa_values)) and not self.is_safe(self.dtype).item()

    @property
    def pattern(self) -> SparsePattern:
        """Where D may be non-zero, on the device of the values.

        Its index tensors are neither parameters nor buffers: DDP would send buffers before every pass and averaged
        models would average them. They move with the layer, and its state dict holds what the pattern follows from:
        the bit mask, `rigsa_words`, or the numbers and the size of its tiles, `rigsa_tiles` and `rigsa_tile`.
        """
        return self._pattern_here()

    def _pattern_here(self) -> SparsePattern:
        if self._pattern.device not in (None, self.rigsa_values.device):  # FSDP and replicas move parameters alone
            self._pattern = self._pattern.to(self.rigsa_values.device)
        return self._pattern

    @property
    def rigsa_words(self) -> Tensor | None:
        """The bit mask of the pattern; None when dense."""
        return self._pattern.words

    def set_pattern(self, pattern: SparsePattern) -> None:
        """Adopt `pattern`, rewind the values to their initial ones and close the gate (RIGSA, section 4.4).

        `rigsa_values` becomes a new parameter: an optimiser made before knows nothing of it, and
        refuses its next step.
        """
        if pattern.shape != (self.out_features, self.in_features):
            raise ValueError(f"pattern: expected [{self.out_features}, {self.in_features}], got {list(pattern.shape)}")
        pattern, device = pattern.to(self.weight.device), self.weight.device
        if (before := self._parameters.get("rigsa_values")) is not None:
            has_left(before, f"a {self.out_features} x {self.in_features} layer")
        with torch.inference_mode(False):  # in it a write to them could not be seen, nor could they be trained later
            if any(indices.is_inference() for indices in pattern.tensors):
                pattern = pattern.map(torch.clone)
            self._adopt_indices(pattern)
            self.rigsa_values = nn.Parameter(
                initial_values(
                    pattern, self.bound, seed=self.seed, key=self.key, dtype=self._values_dtype, device=device
                )
            )
        with torch.no_grad():
            self.rigsa_alpha.fill_(self.alpha_init)

    @torch.no_grad()
    def move_pattern(self, pattern: SparsePattern) -> Tensor:
        """Free other entries, as many as before, in the midst of training: those that stay keep their values, new ones
        start at zero.

        `rigsa_values` stays the same parameter, so its optimiser, a scheduler and DDP stay valid; the optimiser's
        moments follow with `MaskedAdamW.move_state`. A gradient that it has is dropped.

        Returns:
            int64 ``[nnz]``: the place that each value had before, -1 where the entry is new.

        Raises:
            ValueError: `pattern` or the present one is dense, or they differ in shape or in the number of entries.
        """
        if pattern.nnz != self.rigsa_values.numel():
            raise ValueError(f"pattern: expected {self.rigsa_values.numel()} free entries, got {pattern.nnz}")
        pattern = pattern.to(self.weight.device)
        places = pattern.places_in(self.pattern)
        self.rigsa_values.copy_(carry(self.rigsa_values, places))
        self.rigsa_values.grad = None
        self._adopt_indices(pattern)
        return places

    def _adopt_indices(self, pattern: SparsePattern) -> None:
        self.restore_weight()
        self._start()
        self.pattern_note = None
        self._pattern = pattern

    @torch.no_grad()
    def composed_threshold(self) -> float:
        """The |alpha| from which composing in the layer's dtype keeps the adapter (`composed_is_safe`)."""
        return (torch.finfo(self.dtype).eps * self._free_weight_rms() / rms(self.rigsa_values)).item()

    def delta(self) -> Tensor:
        """``m . D`` as an ``[N, K]`` matrix in the values' dtype, without alpha."""
        return self.pattern.scatter(self.rigsa_values.detach())

    def frozen_matrix(self) -> Tensor:
        """W0 as an ``[N, K]`` matrix in `dtype`: decoded behind NF4, a copy where `weight` can be composed in place."""
        if self.in_place_weight is not None:
            return self.in_place_weight.frozen()
        return dequantize(self._base(self.dtype), (self.out_features, self.in_features), self.dtype)

    def kept_tensors(self) -> list[Tensor]:
        """What is kept from one pass to the next beside parameters and buffers."""
        kept = list(self._base_kept[2]) if self._base_kept is not None and not self.is_nf4 else []
        if self.in_place_weight is not None:
            kept.append(self.in_place_weight.base_values)
        elif self._way is not None and self._way.operand is not None:
            kept.append(self._way.operand)
        return kept

    def restore_weight(self) -> None:
        """Bring W0 back into `weight`, bit for bit. The next pass composes it again."""
        if self.in_place_weight is not None:
            restore([self.in_place_weight])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; under autocast in its dtype, else in `dtype`, to which x is cast."""
        if torch.compiler.is_compiling():
            return self._traced_forward(x)
        weight, values, alpha = self._trio()
        way = self._ready
        if way is None or not way.serves(x, weight, values, alpha):
            way = self._prepare(x)
        if x.is_cuda and self.training and torch.cuda.is_current_stream_capturing():
            self._refuse_capture(way)
        bias, dtype = self._own_bias(), way.dtype
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if x.dtype != dtype:
            x = x.to(dtype)
        if not way.enabled:
            return F.linear(x, dequantize(way.base, (self.out_features, self.in_features), dtype), bias)
        if way.operand is not None and not way.exact and not torch.is_grad_enabled():
            return F.linear(x, way.operand, bias)
        return ops.apply_gated_linear(
            x, way.base, bias, values, alpha, way.pattern, way.exact, way.operand, way.columns
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting that changes makes the way of the last pass stale, so no pass has to compare the settings."""
        if name in SETTINGS and self.__dict__.get("_ready") is not None and getattr(self, name) != value:
            self._ready = None
        super().__setattr__(name, value)

    def _prepare(self, x: Tensor) -> _Way:
        """Find the way, in the place of the last one."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            self._refuse_preparing()
        self._way = self._ready = None  # or it would keep the matrix before the next one
        self._way = self._ready = self._find_way(x)
        return self._way

    def _find_way(self, x: Tensor) -> _Way:
        """Decide how to compute, and make the matrix that it takes. A matrix outlives a pass in inference mode."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
        dtype, pattern = self._compute_dtype(x), self.pattern.tensors
        device_type = x.device.type
        with torch.inference_mode(False), torch.no_grad():
            if self.enabled:
                exact, operand, base = self._choose(x, dtype)
            else:
                self.restore_weight()
                exact, operand, base = False, None, self._base(dtype)
            columns = ops.kept_columns(pattern, (self.out_features, self.in_features))
        return _Way(
            Snapshot(*self._trio()), optimizer_steps(), x.dtype, device_type, _autocast(device_type),
            *self._sizes_alike(x, dtype, operand), self.enabled, dtype, exact, operand, base, pattern, columns,
        )  # fmt: skip

    def _sizes_alike(self, x: Tensor, dtype: torch.dtype, operand: Tensor | None) -> tuple[int, int]:
        """The fewest and the most numbers that another x may have to go the same way."""
        few, any_number = GENERATION_TOKENS * self.in_features, sys.maxsize
        if operand is self.weight or not kernels_win(self.rule_device or x.device, dtype):
            return 0, any_number
        return (0, few) if x.numel() <= few else (few + 1, any_number)

    def _choose(self, x: Tensor, dtype: torch.dtype) -> tuple[bool | Tensor, Tensor | None, list[Tensor]]:
        """`exact`, `operand` and `base` of a way."""
        device, tokens = self.rule_device or x.device, x.numel() // max(self.in_features, 1)
        may_write = self._may_write(dtype)
        exact = self._is_exact(dtype) if may_write else None
        path = choose_path(
            device, dtype, (self.out_features, self.in_features), tokens,
            nf4=self.is_nf4, in_place=may_write and not exact, force=self.force,
        )  # fmt: skip
        if path == "fused":
            self.restore_weight()
            return self._exact_flag(dtype), None, self._base(dtype)
        if exact is None:
            exact = self._is_exact(dtype)
        self._log_switch(exact)
        if not exact and may_write and self._compose_in_place():
            return False, self.weight, []
        self.restore_weight()
        base = self._base(dtype)
        if exact:
            # A dense difference is at hand. A packed one is scattered for each product, and no matrix is kept.
            dense = self.rigsa_values.detach().to(dtype) if self._pattern.is_dense else None
            return True, dense, base
        return False, self._composed(self.weight.detach()).to(dtype), []

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """Autocast leaves float64 layers alone, as it does nn.Linear."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.dtype

    def _composed(self, frozen: Tensor) -> Tensor:
        """``W0 + alpha * D``, a new matrix in W0's dtype, with the bits that composing in place gives."""
        values, alpha, pattern = self.rigsa_values.detach(), self.rigsa_alpha.detach(), self.pattern.tensors
        if not pattern:
            return operators.compose(frozen, values, alpha, pattern)
        matrix, base_values = frozen.clone(), frozen.new_empty(values.numel())
        operators.gather_free_([base_values], [matrix], pattern)
        operators.compose_free_([matrix], [base_values], [values], [alpha], pattern)
        return matrix

    def _may_write(self, dtype: torch.dtype) -> bool:
        """Whether composing in place is open to this layer: a packed difference over a weight that is its own."""
        weight = self._trio()[0]
        return (
            self.in_place
            and not self.is_nf4
            and not self._pattern.is_dense
            and dtype == weight.dtype
            and self._home() is weight
            and weight.is_contiguous()
            and not weight.is_inference()
            and not getattr(self, "_is_replica", False)
        )

    def _compose_in_place(self) -> bool:
        """Have `weight` hold the sum. False where another layer writes into it; neither does from then on."""
        own = self.in_place_weight
        if own is not None and not own.check_untouched():
            own = self.in_place_weight = self._weight_rms = None
        if own is None:
            if not self._claim_weight():
                return False
            own = self.in_place_weight = InPlaceWeight(self.weight, self.pattern)
        if not own.holds(self.rigsa_values, self.rigsa_alpha):
            self._peers.compose(self)
        return True

    def _claim_weight(self) -> bool:
        """False where another layer writes into this weight; then neither does any more."""
        other = _claims.get(self.weight, lambda: None)()
        if other is None or other is self or other.weight is not self.weight:
            _claims[self.weight] = weakref.ref(self)
            return True
        for layer in (self, other):
            layer.restore_weight()
            layer.in_place, layer.in_place_weight, layer._way, layer._ready = False, None, None, None
        return False

    def trains_any_of(self, parameters: set[int]) -> bool:
        """Whether the values or the gate are among `parameters`, by identity."""
        _, values, alpha = self._trio()
        return id(values) in parameters or id(alpha) in parameters

    def awaits_composing(self) -> bool:
        """Whether the last pass composed in place, and the weight does not hold the present sum."""
        own = self.in_place_weight
        return (
            own is not None
            and self.enabled
            and self._home() is self._trio()[0]
            and self._way is not None
            and self._way.operand is self.weight
            and own.check_untouched()
            and not own.holds(self.rigsa_values, self.rigsa_alpha)
        )

    def _traced_forward(self, x: Tensor) -> Tensor:
        """For torch.compile: a graph holds no state of ours, so each call makes the matrix from W0."""
        dtype = self._compute_dtype(x)
        weight, own = self.weight, self.in_place_weight
        if own is not None and own.is_composed:
            weight = operators.with_free(weight, own.base_values, own.pattern.tensors)
        base = self._base(dtype) if self.is_nf4 else [weight.to(dtype)]
        bias = None if self.bias is None else self.bias.to(dtype)
        x = x.to(dtype)
        if not self.enabled:
            return F.linear(x, dequantize(base, (self.out_features, self.in_features), dtype), bias)
        exact = self.numerics == "exact" or (self.numerics == "auto" and dtype in HALF_DTYPES)
        return ops.gated_linear(x, base, bias, self.rigsa_values, self.rigsa_alpha, self.pattern, exact=exact)

    def _base(self, dtype: torch.dtype) -> list[Tensor]:
        """The frozen weight as operators take it, in `dtype`. What is decoded or cast for it is kept."""
        weight = self._trio()[0]
        if not self.is_nf4 and dtype == weight.dtype:
            return [weight]
        kept = self._base_kept
        if kept is None or kept[1] != dtype or not kept[0].is_of(weight):
            base = nf4_base(weight) if self.is_nf4 else [weight.to(dtype)]
            kept = self._base_kept = Snapshot(weight), dtype, base
        return kept[2]

    def _is_exact(self, dtype: torch.dtype) -> bool:
        """The host's decision between two products and one."""
        if self.numerics != "auto":
            return self.numerics == "exact"
        if dtype not in HALF_DTYPES:
            return False
        if self.training and self.decides_by_optimizer():
            return self.exact_in_training
        return not self.is_safe(dtype).item()

    def decides_by_optimizer(self) -> bool:
        """Whether `exact_in_training` is what `auto` goes by (`rigsa_kernels.switching`)."""
        return (self.rule_device or self._trio()[0].device).type != "cpu"

    def composing_norm(self, dtype: torch.dtype) -> Tensor:
        """``|alpha|`` times the 2-norm of the values from which composing in `dtype` is safe: a scalar on the layer's
        device.

        `composed_is_safe` with its root of the count on the other side. It changes with the weight and the pattern
        only.
        """
        weight_rms = self._free_weight_rms()
        if self._threshold is None or self._threshold[0] != dtype:
            root = math.sqrt(max(self.rigsa_values.numel(), 1))
            self._threshold = dtype, torch.finfo(dtype).eps * root * weight_rms
        return self._threshold[1]

    def _exact_flag(self, dtype: torch.dtype) -> Tensor:
        """The device's decision, for the fused path: a boolean of shape ``(1,)`` that nobody waits for."""
        if self.numerics != "auto" or dtype not in HALF_DTYPES:
            exact = self.numerics == "exact"
            return torch.full((1,), exact, dtype=torch.bool, device=self.rigsa_alpha.device)
        if self._home() is not self._trio()[0]:  # in the next pass its parameters are other tensors
            return need_two_products([self], dtype)
        if self._lacks_flag(dtype):
            self._peers.find_flags(self, dtype)
        assert self._flag is not None
        return self._flag[2]

    def _lacks_flag(self, dtype: torch.dtype) -> bool:
        return self._flag is None or self._flag[0] != dtype or not self._flag[1].is_of(*self._trio())

    def awaits_flag(self, dtype: torch.dtype) -> bool:
        """Whether the last pass multiplied in `dtype` by a flag of the device, which is no longer that of the present
        values."""
        way = self._way
        return (
            way is not None
            and isinstance(way.exact, Tensor)
            and way.dtype == dtype
            and self.enabled
            and self.numerics == "auto"
            and self._home() is self._trio()[0]
            and self._lacks_flag(dtype)
        )

    def keep_flag(self, dtype: torch.dtype, flag: Tensor) -> None:
        """Until the parameters change, or `forget_flag`."""
        self._flag = dtype, Snapshot(*self._trio()), flag

    def forget_flag(self) -> None:
        """An optimiser has changed the values or the gate, and may not have told their version counters."""
        self._flag = None

    @torch.no_grad()
    def is_safe(self, dtype: torch.dtype) -> Tensor:
        """`composed_is_safe` of the layer as it is now: a boolean of shape ``(1,)`` on its device."""
        alpha, values = self.rigsa_alpha.detach(), self.rigsa_values.detach()
        return composed_is_safe(alpha, values, self._free_weight_rms(), dtype)

    def _free_weight_rms(self) -> Tensor:
        """Of W0 at the free entries. It changes with the weight and the pattern only, so it is kept."""
        weight, own = self._trio()[0], self.in_place_weight
        if self._weight_rms is None or not (own is not None or self._weight_rms[0].is_of(weight)):
            self._threshold = None
            self._weight_rms = Snapshot(weight), rms(self._free_weight_entries())
        return self._weight_rms[1]

    def _free_weight_entries(self) -> Tensor:
        if self.in_place_weight is not None:
            return self.in_place_weight.base_values
        entries = self.frozen_matrix()
        if not self._pattern.is_dense:
            matrix, entries = entries, entries.new_empty(self.rigsa_values.numel())
            operators.gather_free_([entries], [matrix], self.pattern.tensors)
        return entries

    def _log_switch(self, exact: bool) -> None:
        if self._was_exact not in (None, exact):
            how = "exact" if exact else "composed"
            logger.info("%s x %s layer: %s from here on", self.out_features, self.in_features, how)
        self._was_exact = exact

    def _refuse_preparing(self) -> None:
        """What a capture runs is recorded and not done, so a weight that is composed in it would hold W0 after all."""
        if self.training and self.numerics == "auto":
            raise RuntimeError(NO_CAPTURE)
        raise RuntimeError(
            "CUDA graph: expected a pass of the model, in the same mode and after the last change of its parameters, "
            "before the capture, as a layer prepares its matrix in the first pass"
        )

    def _refuse_capture(self, way: _Way) -> None:
        """A captured graph replays products; what is decided and written once a step would not be part of it."""
        if self.enabled and (way.operand is not None or self.numerics == "auto"):
            raise RuntimeError(NO_CAPTURE)

    def _trio(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, values and gate, in an nn.DataParallel replica, too, which has no parameters."""
        tensors: Any = self._parameters  # faster than a module's attributes
        if "weight" not in tensors:
            tensors = self.__dict__
        return tensors["weight"], tensors["rigsa_values"], tensors["rigsa_alpha"]

    def _own_bias(self) -> Tensor | None:
        """The bias, as fast."""
        tensors: Any = self._parameters
        return tensors["bias"] if "bias" in tensors else self.__dict__.get("bias")

    def _replicate_for_data_parallel(self) -> GatedSparseLinear:
        """The copies that replicas get of the weight are made before this, so they must be of W0."""
        own = self.in_place_weight
        if own is not None and own.is_composed:
            raise RuntimeError(
                "weight: it holds W0 + alpha * D after a pass outside nn.DataParallel; call "
                "rigsa.restore_weights(model) first"
            )
        self.in_place = False
        return super()._replicate_for_data_parallel()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold W0 and nothing that was made from it."""
        self.restore_weight()
        made = (
            "in_place_weight", "_way", "_ready", "_base_kept", "_weight_rms", "_threshold", "_flag", "_home", "_made",
        )  # fmt: skip
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._peers.join(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        """A state shows W0, in a matrix of its own where passes write into `weight`, and all that makes the layer.

        No two of its tensors share memory, which safetensors does not take: other layers may share the gate.
        """
        if keep_vars:
            self.restore_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}rigsa_alpha"] = destination[f"{prefix}rigsa_alpha"].clone()
        pattern = self._pattern
        if pattern.tiles is not None:
            destination[f"{prefix}rigsa_tiles"] = pattern.tiles.clone()
            destination[f"{prefix}rigsa_tile"] = torch.tensor(
                pattern.tile, dtype=torch.int32, device=pattern.tiles.device
            )
        elif pattern.bits is not None:
            destination[f"{prefix}rigsa_words"] = pattern.bits.clone()
        if self.is_nf4:
            destination.update({f"{prefix}{name}": tensor for name, tensor in scales_of(self.weight).items()})
        if not keep_vars and self._may_write(self.weight.dtype):
            own = self.in_place_weight
            destination[f"{prefix}weight"] = self.weight.detach().clone() if own is None else own.frozen()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """A state brings its pattern along: a ticket loads into a dense layer, and the other way round.

        Of a pattern the bit mask or the tiles alone are read; what follows from them is counted again.
        """
        alpha = state_dict.get(f"{prefix}rigsa_alpha")
        if alpha is not None and not alpha.isfinite().all():
            raise ValueError(f"{prefix}rigsa_alpha: expected a finite gate, got {alpha.item()}")
        self.restore_weight()
        self._start()
        if f"{prefix}rigsa_values" in state_dict:
            pattern = _pattern_in(state_dict, prefix, self._pattern.shape)
            if not pattern.equals(self._pattern):
                self.set_pattern(pattern)
        scales = {name[len(prefix) :]: state_dict[name] for name in state_dict if name.startswith(prefix + SCALES)}
        if self.is_nf4 and scales:
            load_scales(self.weight, scales)
        elif self.is_nf4 and f"{prefix}weight" in state_dict:
            missing += [prefix + name for name in scales_of(self.weight)]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        ours = {prefix + name for name in (*DERIVED, *INDICES, *(scales if self.is_nf4 else ()))}
        unexpected[:] = [name for name in unexpected if name not in ours]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.restore_weight()
        self._start()
        self._pattern = self._pattern.map(fn)
        result = super()._apply(fn, recurse)
        self._home = weakref.ref(self.weight)
        return result

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={self.pattern.density:.4f}, numerics={self.numerics}"
            + ("" if (tile := self.pattern.tile) is None else f", tile={tile[0]}x{tile[1]}")
        )
