"""`GatedSparseLinear`: a frozen linear layer plus a gated sparse difference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rigsa_kernels import ops, reference
from rigsa_kernels.dispatch import Path, choose_path
from rigsa_kernels.format import SparsePattern, carry
from rigsa_kernels.init import initial_values
from rigsa_kernels.nf4 import dequantize, is_nf4_linear, nf4_base

logger = logging.getLogger(__name__)

Numerics = Literal["auto", "exact", "composed"]
T = TypeVar("T")
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Where composing can lose the adapter."""
ALPHA_INIT = 1e-6
"""The gate's initial value (RIGSA, section 3)."""

_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# PyTorch's fused optimisers change parameters without raising their version counters, so steps are counted as well.
register_optimizer_step_post_hook(_count_optimizer_step)


def is_plain_linear(module: nn.Module) -> bool:
    """An ``nn.Linear`` that computes what it says: no packed 4-bit weight, no other forward."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module.weight.is_floating_point()
        and tuple(module.weight.shape) == (module.out_features, module.in_features)
    )


def _same_words(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def rms(tensor: Tensor) -> Tensor:
    """Root mean square in float32; 0 for an empty tensor."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) / math.sqrt(max(tensor.numel(), 1))


def composed_is_safe(alpha: Tensor, values: Tensor, weight_rms: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rounding ``W0 + alpha * D`` to `dtype` keeps the adapter: a boolean tensor, shape ``(1,)``.

    The rule is ``|alpha| * rms(D) >= eps * rms(W0)`` with the dtype's eps. tests/test_numerics.py holds what it rests
    on: in bfloat16, the whole adapter term reaches y at the threshold, with about 20 % noise, a third of it at a tenth
    of the threshold and next to nothing at a hundredth. In float32 and float64 composing is always safe.
    """
    return alpha.abs() * rms(values) >= torch.finfo(dtype).eps * weight_rms


class GatedSparseLinear(nn.Module):
    """``y = x W0^T + alpha * x (m . D)^T + b``: W0 and b frozen, D's free entries and the gate alpha trained.

    It takes the place of an ``nn.Linear`` (or of a bitsandbytes ``Linear4bit`` in NF4) and shares its weight and bias.
    Trainable parameters carry the prefix ``rigsa_``: `rigsa_values` holds the free entries (``[N, K]`` while the
    pattern is dense, ``[nnz]`` once packed) and `rigsa_alpha` the gate, shape ``(1,)``. Entries outside the pattern are
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
            that keeps the adapter, which is always in float32 and float64, and by `composed_is_safe`, once a step, in
            bfloat16 and float16: decided by the host on a CPU and by the device in a fused kernel. Where a CUDA layer
            takes the gemm path the host would have to wait for the answer, so 16-bit layers are exact there.
        force: ``"fused"`` or ``"gemm"`` in place of the rule in `rigsa_kernels.dispatch`.

    Raises:
        ValueError: `linear` is neither of the two, or an argument is out of range; in `forward`, `force` names a path
            that cannot run there.

    On the gemm path the matrix that every call of a step needs (W0 + alpha D when composed, D in the weight's dtype
    when exact) is made once and kept until an optimiser steps or a parameter's version counter moves (a write through
    ``.data`` outside an optimiser moves neither). It is not part of the state dict.

    Where `enabled` is set to False, the layer is the frozen one alone; nothing that is trained or saved changes.
    """

    enabled: bool = True
    rigsa_words: Tensor | None
    rigsa_word_offsets: Tensor | None
    rigsa_row_base: Tensor | None

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
        self.seed, self.key, self.numerics, self.force = seed, key, numerics, force
        self.alpha_init, self.bound = alpha_init, init_scale / math.sqrt(linear.in_features)
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self._origin = (linear,)  # in a tuple, or it would be a submodule
        self._kept: dict[str, tuple[object, Any]] = {}
        self._last: tuple[object, str, Tensor] | None = None
        combine_dtype = torch.promote_types(self.dtype, torch.float32)
        self._values_dtype = values_dtype or combine_dtype
        if alpha is None:
            alpha = nn.Parameter(torch.empty(1, dtype=combine_dtype, device=self.weight.device))
        self.rigsa_alpha = alpha
        self.set_pattern(pattern or SparsePattern.dense(self.out_features, self.in_features))

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
        (linear,) = self._origin
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

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
        weight = torch.ops.rigsa.compose(
            self.weight, self.rigsa_values.detach(), self.rigsa_alpha.detach(), self.pattern.tensors
        )
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
        return bool(self.rigsa_alpha * rms(self.rigsa_values)) and not self._is_safe(self.dtype).item()

    @property
    def pattern(self) -> SparsePattern:
        """Where D may be non-zero; its index tensors are this module's buffers, so they move and save with it."""
        indices = (self.rigsa_words, self.rigsa_word_offsets, self.rigsa_row_base)
        return SparsePattern(self.out_features, self.in_features, self.rigsa_values.numel(), *indices)

    def set_pattern(self, pattern: SparsePattern) -> None:
        """Adopt `pattern`, rewind the values to their initial ones and close the gate (RIGSA, section 4.4).

        `rigsa_values` becomes a new parameter: an optimiser made before knows nothing of it.
        """
        if pattern.shape != (self.out_features, self.in_features):
            raise ValueError(f"pattern: expected [{self.out_features}, {self.in_features}], got {list(pattern.shape)}")
        pattern = pattern.to(self.weight.device)
        self._adopt_indices(pattern)
        self.rigsa_values = nn.Parameter(
            initial_values(
                pattern, self.bound, seed=self.seed, key=self.key, dtype=self._values_dtype, device=self.weight.device
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
        self._forget()
        self.register_buffer("rigsa_words", pattern.words)
        self.register_buffer("rigsa_word_offsets", pattern.word_offsets)
        self.register_buffer("rigsa_row_base", pattern.row_base)

    def composed_threshold(self) -> float:
        """The |alpha| from which composing in the layer's dtype keeps the adapter (`composed_is_safe`)."""
        weight_rms, delta_rms = rms(self.frozen_matrix()), rms(self.rigsa_values.detach())
        return (torch.finfo(self.dtype).eps * weight_rms / delta_rms).item()

    def delta(self) -> Tensor:
        """``m . D`` as an ``[N, K]`` matrix in the values' dtype, without alpha."""
        return self.pattern.scatter(self.rigsa_values.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; under autocast in its dtype, else in `dtype`, to which x is cast."""
        without_grad = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        stamp = self._stamp(x) if without_grad else None
        if without_grad and self._last is not None:
            last_stamp, last_device, matrix = self._last
            if last_stamp == stamp and not torch.is_autocast_enabled(last_device):
                return F.linear(x, matrix, self.bias)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.dtype
        if not self.enabled:
            return self._frozen(x.to(dtype), dtype)
        exact, operand = self._way(x, dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if operand is not None and not exact and without_grad:
            if x.dtype == dtype and bias is self.bias and not autocast:
                self._last = stamp, device, operand
            return F.linear(x.to(dtype), operand, bias)
        return ops.gated_linear(
            x.to(dtype), self._base(dtype), bias, self.rigsa_values, self.rigsa_alpha, self.pattern,
            exact=exact, operand=operand,
        )  # fmt: skip

    def _way(self, x: Tensor, dtype: torch.dtype) -> tuple[bool | Tensor, Tensor | None]:
        """How this call is computed: `exact` and `operand` of `ops.gated_linear`."""
        tokens, shape = x.numel() // max(self.in_features, 1), (self.out_features, self.in_features)
        if choose_path(x.device, dtype, shape, tokens, nf4=self.is_nf4, force=self.force) == "fused":
            return self._exact_flag(dtype), None
        if torch.compiler.is_compiling():
            return self._is_exact(dtype), None  # a traced graph holds no state of ours: each call makes the matrix
        return self._keep("operand", (dtype, self.numerics, self._versions()), lambda: self._make_operand(dtype))

    def _stamp(self, x: Tensor) -> tuple[object, ...]:
        """Where a call without gradients has the last one's, so is its matrix: a token of text waits for every layer's
        host time, and to find the way again takes most of it (docs/benchmarks.md)."""
        return (*self._versions(), x.shape, x.dtype, self.enabled, self.numerics, self.force)

    def _frozen(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer that was adapted."""
        weight = dequantize(self._base(dtype), (self.out_features, self.in_features), dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(dtype))

    def _base(self, dtype: torch.dtype) -> list[Tensor]:
        """The frozen weight as operators take it."""
        if self.is_nf4:
            return self._keep("base", self._weight_version, lambda: nf4_base(self.weight))
        if dtype == self.weight.dtype or torch.compiler.is_compiling():
            return [self.weight.to(dtype)]
        return self._keep("base", (dtype, self._weight_version), lambda: [self.weight.to(dtype)])

    def _is_exact(self, dtype: torch.dtype) -> bool:
        """The host's decision, for the gemm path."""
        if self.numerics != "auto":
            return self.numerics == "exact"
        if dtype not in HALF_DTYPES:
            return False
        if torch.compiler.is_compiling() or self.weight.device.type != "cpu":
            return True
        return not self._is_safe(dtype).item()

    def _exact_flag(self, dtype: torch.dtype) -> Tensor:
        """The device's decision, for the fused path: a boolean of shape ``(1,)`` that nobody waits for."""
        if self.numerics == "auto" and dtype in HALF_DTYPES and not torch.compiler.is_compiling():
            return self._keep("exact_flag", (dtype, self._versions()), lambda: ~self._is_safe(dtype))
        return torch.full((1,), self._is_exact(dtype), dtype=torch.bool, device=self.rigsa_alpha.device)

    def _is_safe(self, dtype: torch.dtype) -> Tensor:
        weight_rms = self._keep("weight_rms", self._weight_version, lambda: rms(self.frozen_matrix()))
        return composed_is_safe(self.rigsa_alpha.detach(), self.rigsa_values.detach(), weight_rms, dtype)

    @property
    def _weight_version(self) -> tuple[int, int]:
        """Of a frozen weight: no optimiser moves it."""
        return self.weight.data_ptr(), self.weight._version

    def frozen_matrix(self) -> Tensor:
        """W0 as an ``[N, K]`` matrix in `dtype`; decoded, behind NF4."""
        return dequantize(self._base(self.dtype), (self.out_features, self.in_features), self.dtype)

    def _make_operand(self, dtype: torch.dtype) -> tuple[bool, Tensor]:
        """Whether the gemm path is exact, and the matrix, in `dtype`, that every call of a step multiplies by."""
        self._last = None  # or it would keep the matrix before this one
        exact, before = self._is_exact(dtype), self._kept.get("operand")
        if before is not None and before[1][0] != exact:
            logger.info(
                "%s x %s layer: %s from here on, at alpha = %.2e",
                self.out_features, self.in_features, "exact" if exact else "composed", self.rigsa_alpha.item(),
            )  # fmt: skip
        if not exact:
            return False, self._composed(dtype)
        self._kept.pop("composed", None)  # no second matrix
        pattern = self.pattern
        return True, reference.delta_matrix(self.rigsa_values.detach(), pattern.shape, pattern.tensors, dtype)

    def _composed(self, dtype: torch.dtype) -> Tensor:
        """``W0 + alpha D``: of a packed D, the one matrix of all steps, in which only the free entries are written."""
        values, alpha, pattern = self.rigsa_values.detach(), self.rigsa_alpha.detach(), self.pattern
        if pattern.is_dense or dtype != self.weight.dtype:
            return torch.ops.rigsa.compose(self.weight, values, alpha, pattern.tensors).to(dtype)
        weight = self.weight.detach()
        made = self._keep("composed", self._weight_version, lambda: (weight.clone(), pattern.gather(weight)))
        composed, base_values = made
        torch.ops.rigsa.compose_(composed, base_values, values, alpha, pattern.tensors)
        return composed

    def _keep(self, name: str, versions: object, make: Callable[[], T]) -> T:
        """What `make` gives, remembered under `name` until `versions` change."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False), torch.no_grad():  # or backward could not save it
                kept = self._kept[name] = (versions, make())
        return cast(T, kept[1])

    def _forget(self) -> None:
        self._kept.clear()
        self._last = None

    def _versions(self) -> tuple[int, ...]:
        """These differ where the weight, the values or the gate have moved."""
        # Faster than a module's attributes; nn.DataParallel's replicas have no parameters.
        tensors: Any = self._parameters or self.__dict__
        weight, values, alpha = tensors["weight"], tensors["rigsa_values"], tensors["rigsa_alpha"]
        return (
            _optimizer_steps, weight.data_ptr(), weight._version, values.data_ptr(), values._version,
            alpha.data_ptr(), alpha._version,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        """A state brings its pattern along: a ticket loads into a dense layer, and the other way round."""
        alpha, words = (state_dict.get(f"{prefix}rigsa_{name}") for name in ("alpha", "words"))
        if alpha is not None and not alpha.isfinite().all():
            raise ValueError(f"{prefix}rigsa_alpha: expected a finite gate, got {alpha.item()}")
        if f"{prefix}rigsa_values" in state_dict and not _same_words(words, self.rigsa_words):
            dense = SparsePattern.dense(self.out_features, self.in_features)
            self.set_pattern(dense if words is None else SparsePattern.from_words(words, self.in_features))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={self.pattern.density:.4f}, numerics={self.numerics}"
        )
