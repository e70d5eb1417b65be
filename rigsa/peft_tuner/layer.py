"""What PEFT puts in the place of a linear layer: the layer, and an `AdapterLinear` for each adapter of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from rigsa.adapters import Rule, combined_state
from rigsa.masks import largest_patterns, random_patterns
from rigsa.peft_format import PREFIX
from rigsa.peft_tuner.adapter_linear import AdapterLinear, AdapterWeight
from rigsa.peft_tuner.config import RigsaConfig, SavedLayer, saved_layer
from rigsa.peft_tuner.eight_bits import AdapterEightBits, is_eight_bits
from rigsa.state import put_state, state_of
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.hooks import has_own_forward
from rigsa_kernels.in_place import InPlaceWeight, Peers
from rigsa_kernels.init import layer_key
from rigsa_kernels.linear import is_plain_linear
from rigsa_kernels.nf4 import is_nf4_linear
from rigsa_kernels.selection import own_matrices
from rigsa_kernels.tiles import grid_of

BASE = "__base__"
"""The name that PEFT gives in a mixed batch to rows without an adapter."""
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Tables of hooks that an adapter shares with the linear layer, as one of the two computes each pass."""


@dataclass(frozen=True)
class _Merged:
    """An adapter in the weight: its name, and what the weight held before, at the free entries or as a whole."""

    name: str
    before: Tensor


class RigsaLayer(nn.Module, BaseTunerLayer):
    """What every layer of the method has: adapters by name, one of which is active.

    Args:
        base_layer: the layer that is adapted.
        name: its qualified name in the base model, from which initial values and random entries are drawn.
        is_tied: another module reads the same weight, so no adapter may be composed into it.
    """

    adapter_layer_names = ("rigsa_adapter",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, is_tied: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rigsa_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.name, self.is_tied = name, is_tied
        self._merged: list[_Merged] = []
        self._active_here: list[str] = []
        self._wants_in_place: dict[str, bool] = {}
        self.register_state_dict_post_hook(_show_the_frozen_weight)

    @property
    def adapters(self) -> dict[str, AdapterLinear]:
        """Name to adapter."""
        return {name: cast(AdapterLinear, module) for name, module in self.rigsa_adapter.items()}

    @property
    def active(self) -> str | None:
        """The name of the active adapter; None where the layer has none of those that are active in the model.

        Raises:
            ValueError: several are active.
        """
        if len(self._active_here) > 1:
            raise ValueError(
                f"set_adapter: expected one adapter of RIGSA at a time, got {', '.join(self._active_here)}; "
                "make one of them with model.add_weighted_adapter"
            )
        return self._active_here[0] if self._active_here else None

    def update_layer(self, adapter_name: str, config: RigsaConfig, peers: Peers, twin: str | None = None) -> None:
        """Add an adapter: a new one, or, where `config` comes from a file, room for the one in the file.

        Args:
            adapter_name, config: of the new adapter.
            peers: the layers of the model.
            twin: an adapter with the same configuration, whose entries the new one has, whatever became of them.
        """
        adapter = self._new_adapter(
            config, None if twin is None or twin not in self.rigsa_adapter else self.adapters[twin].pattern
        )
        adapter.join(peers)
        adapter.train(self.training)
        self._wants_in_place[adapter_name] = config.in_place and not self.is_tied
        self.rigsa_adapter[adapter_name] = adapter
        self._share_the_weight()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_adapter(self, config: RigsaConfig, pattern: SparsePattern | None) -> AdapterLinear:
        """One with these entries, or with those that `config` asks for, or one that awaits those of a file."""
        saved = self._saved(config, self.shape)
        if saved is not None:
            rows, columns = self.shape
            pattern = SparsePattern.from_words(torch.zeros(-(-columns // 32), rows, dtype=torch.int32), columns)
        adapter = self._make(
            seed=config.seed,
            key=layer_key(self.name),
            pattern=pattern or self._pattern(config, self.shape),
            alpha_init=config.alpha_init,
            init_scale=config.init_scale,
            values_dtype=config.dtype,
            numerics=config.numerics,
            in_place=config.in_place,
        )
        if saved is not None:
            adapter.await_saved(saved.encoding, saved.entries)
        return adapter

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        raise NotImplementedError

    def _make(self, **options: Any) -> AdapterLinear:
        raise NotImplementedError

    def _saved(self, config: RigsaConfig, shape: tuple[int, int]) -> SavedLayer | None:
        """What a file says of this layer. Raises ValueError where it has nothing, or another shape."""
        if config.layers is None:
            return None
        if self.name not in config.layers:
            raise ValueError(f"layers: the adapter has nothing for {self.name}; was it trained on another model?")
        saved = saved_layer(self.name, config.layers[self.name])
        if saved.shape != shape:
            raise ValueError(
                f"layers: {self.name} is {list(saved.shape)} in the adapter and {list(shape)} in the model"
            )
        return saved

    def _pattern(self, config: RigsaConfig, shape: tuple[int, int]) -> SparsePattern:
        """Raises ValueError where the layer would be left without a free entry."""
        if config.init == "magnitude":
            matrix = self._frozen_matrix()
            matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
            return largest_patterns(
                {self.name: matrix}, density=config.density or 1.0, ranking="layer", by="magnitude", tile=config.tile
            )[self.name]
        if config.density is None:
            return SparsePattern.dense(*shape)
        count = round(config.density * math.prod(grid_of(shape, config.tile)))
        if count == 0:
            raise ValueError(f"density: {config.density} leaves {self.name} empty; keep more")
        if config.init == "gradient":  # until the batches were asked, when the whole model is there
            return SparsePattern.dense(*shape)
        return random_patterns({self.name: shape}, {self.name: count}, seed=config.seed, tile=config.tile)[self.name]

    def _frozen_matrix(self) -> Tensor:
        raise NotImplementedError

    def _set_weight(self, matrix: Tensor) -> None:
        raise NotImplementedError

    def _share_the_weight(self) -> None:
        """One adapter alone may be composed into the weight itself; several would write over each other."""
        for name, adapter in self.adapters.items():
            adapter.let_go()
            adapter.in_place = self._wants_in_place[name] and len(self.rigsa_adapter) == 1

    def restore_weight(self) -> None:
        """Bring W0 back into the weight. The next pass composes it again."""
        for adapter in self.adapters.values():
            adapter.restore_weight()

    def get_base_weight(self) -> Tensor:
        """W0, or what it was merged to: a matrix of its own."""
        return self._frozen_matrix().clone()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. What waits has no gradient, and keeps nothing in memory but itself."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._active_here = [name for name in self.active_adapters if name in self.rigsa_adapter]
        for name, adapter in self.adapters.items():
            adapter.waiting = name not in self.active_adapters
            if adapter.waiting:
                adapter.let_go()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT."""
        if adapter_name in self.rigsa_adapter:
            self.adapters[adapter_name].let_go()
            self._wants_in_place.pop(adapter_name)
        super().delete_adapter(adapter_name)
        self._active_here = [name for name in self.active_adapters if name in self.rigsa_adapter]
        self._share_the_weight()

    def combine(self, new: str, weights: dict[str, float], rule: Rule, density: float, config: RigsaConfig) -> None:
        """Put into the adapter `new`, which is there, what `rigsa.Adapters.combine` makes of others."""
        states = [state_of(self.adapters[name]) for name in weights if name in self.rigsa_adapter]
        numbers = [weight for name, weight in weights.items() if name in self.rigsa_adapter]
        states = [
            replace(state, pattern=state.pattern.to("cpu"), values=state.values.cpu(), gate=state.gate.cpu())
            for state in states
        ]
        put_state(self.adapters[new], combined_state(self.name, states, numbers, rule, density))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the weight. It is always checked that the sum is finite, as if `safe_merge` were True.

        Raises:
            ValueError: the weight is in four bits, rounding would lose an adapter, or a sum is not finite; the weight
                is unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.rigsa_adapter:
                continue
            self.check_merge(name)
            adapter = self.adapters[name]
            for other in self.adapters.values():
                other.let_go()
            merged = adapter.merged_weight()
            if not bool(merged.isfinite().all()):
                raise ValueError(f"merge: W0 + alpha * D of adapter {name!r} is not finite in {self.name}")
            weight = adapter.weight
            before = weight.data if adapter.pattern.is_dense else adapter.pattern.gather(weight.data)
            self._set_weight(merged)
            self._merged.append(_Merged(name, before))
            self.merged_adapters.append(name)

    def check_merge(self, name: str) -> None:
        """Raises ValueError where the adapter `name` cannot be merged."""
        adapter = self.adapters[name]
        if adapter.is_nf4 or adapter.is_quantised:
            bits = "four" if adapter.is_nf4 else "eight"
            raise ValueError(
                f"merge: W0 is in {bits} bits in {self.name}, which have no room for a difference; load the base in 16 "
                "or 32 bits, and the adapter onto it"
            )
        finite = bool(adapter.rigsa_alpha.isfinite().all()) and bool(adapter.rigsa_values.isfinite().all())
        if not finite:
            raise ValueError(f"merge: adapter {name!r} has values or a gate that are not finite in {self.name}")
        if adapter.merging_loses():
            raise ValueError(
                f"merge: {self.name} is in 16 bits, and rounding W0 + alpha * D would take most of adapter {name!r} "
                "away; merge model.float()"
            )

    def unmerge(self) -> None:
        """Take the merged adapters out again, to the bit."""
        while self._merged:
            merged = self._merged.pop()
            self.merged_adapters.remove(merged.name)
            adapter = self.adapters[merged.name]
            if adapter.pattern.is_dense:
                self._set_weight(merged.before.to(adapter.weight.device))
            else:
                before, index = [merged.before.to(adapter.weight)], adapter.pattern.tensors
                torch.ops.rigsa.scatter_free_([adapter.weight.data], before, index)
            adapter.let_go()

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        if keep_vars:
            self.restore_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """A state may bring another W0, which is written over W0 and not over what a pass composed."""
        for adapter in self.adapters.values():
            adapter.let_go()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for adapter in self.adapters.values():
            adapter.let_go()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold W0."""
        self.restore_weight()
        return self.__dict__

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in PEFT, but the dtype of the values stays what it is."""
        if adapter_name in self.rigsa_adapter:
            adapter = self.adapters[adapter_name]
            if not adapter.rigsa_values.is_meta:
                adapter.to(device or adapter.weight.device)


class RigsaLinear(RigsaLayer):
    """Around an ``nn.Linear``, or a layer of bitsandbytes in NF4 or in 8 bits."""

    def __init__(self, base_layer: nn.Module, name: str, is_tied: bool) -> None:
        super().__init__(base_layer, name, is_tied)
        linear: Any = base_layer
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @staticmethod
    def check(name: str, module: nn.Module) -> None:
        """Raises ValueError where `module` cannot be adapted."""
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"target_modules: {name} carries an adapter of another method ({type(module).__module__}); merge or "
                "unload that one first"
            )
        linear = cast(nn.Linear, module)
        if not is_plain_linear(linear) and not is_nf4_linear(linear) and not is_eight_bits(linear):
            raise ValueError(
                f"target_modules: {name} is a {type(module).__name__}; RIGSA adapts linear layers in floating point, "
                "in 8 bits or in NF4 (load_in_4bit with bnb_4bit_quant_type='nf4'), so leave it out"
            )
        if has_own_forward(module):
            raise ValueError(
                f"target_modules: {name} has a forward of its own, so what it computes is unknown; leave it out"
            )
        if cast(Tensor, module.weight).is_meta and "_hf_hook" in module.__dict__:
            raise ValueError(f"target_modules: the weight of {name} is offloaded; load it into memory, or leave it out")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _make(self, **options: Any) -> AdapterLinear:
        kind = AdapterEightBits if is_eight_bits(self.base_layer) else AdapterLinear
        adapter = kind(cast(nn.Linear, self.base_layer), **options)
        adapter.name_in_base = self.name
        for table in HOOKS:
            adapter.__dict__[table] = self.base_layer.__dict__[table]
        adapter._is_full_backward_hook = self.base_layer._is_full_backward_hook
        return adapter

    def _set_weight(self, matrix: Tensor) -> None:
        cast(nn.Parameter, self.base_layer.weight).data = matrix

    def _frozen_matrix(self) -> Tensor:
        if self.adapters:
            return next(iter(self.adapters.values())).frozen_matrix()
        base: Any = self.base_layer
        if is_eight_bits(base):
            return dequantize_bnb_weight(base.weight, state=base.state)
        return cast(Tensor, base.weight)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """What the active adapter computes; with `adapter_names` each row is computed by the adapter named there."""
        if adapter_names is not None:
            return self._mixed(x, list(adapter_names))
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        name = None if self._disable_adapters or self.merged_adapters else self.active
        return self._without_adapter(x) if name is None else cast(Tensor, self.rigsa_adapter[name](x))

    def _without_adapter(self, x: Tensor, keep: bool = False) -> Tensor:
        """What the base layer computes.

        In training a backward pass may wait for the composed weight, as in DPO, whose reference is the model without
        its adapter. So W0 is not written back then, nor when asked to `keep`, but multiplied by as a copy.
        """
        composed = [
            adapter
            for adapter in self.adapters.values()
            if adapter.in_place_weight is not None and adapter.in_place_weight.is_composed
        ]
        if composed and torch.compiler.is_compiling():  # a graph writes to no weight
            own = cast(InPlaceWeight, composed[0].in_place_weight)
            frozen = torch.ops.rigsa.with_free(own.weight, own.base_values, own.pattern.tensors)
            return F.linear(x, frozen, composed[0].bias)
        if composed and (keep or self.training):
            return F.linear(x, composed[0].frozen_matrix(), composed[0].bias)
        self.restore_weight()
        return cast(Tensor, self.base_layer(x))

    def _mixed(self, x: Tensor, names: list[str]) -> Tensor:
        if self.merged or self.disable_adapters:
            raise ValueError("adapter_names: expected adapters that are neither merged nor disabled")
        if len(names) != len(x):
            raise ValueError(f"adapter_names: expected one for each of {len(x)} rows, got {len(names)}")
        result = None
        for name in dict.fromkeys(names):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            if name == BASE or name not in self.rigsa_adapter:
                part = self._without_adapter(x[rows], keep=True)
            else:
                part = cast(Tensor, self.rigsa_adapter[name](x[rows]))
            if result is None:
                result = part.new_empty(len(names), *part.shape[1:])
            result = result.index_copy(0, rows, part)
        assert result is not None
        return result


class ParamWrapper(RigsaLayer):
    """Around a module of which one parameter is adapted: the experts of a mixture, GPT-2's ``Conv1D``.

    While the module computes, its attribute is the composed parameter. PEFT knows such a layer by the name of its
    class, and puts one around another where two parameters of a module are adapted.
    """

    def __init__(self, base_layer: nn.Module, name: str, is_tied: bool, parameter_name: str) -> None:
        super().__init__(base_layer, name, is_tied)
        self.parameter_name = parameter_name

    @staticmethod
    def check(name: str, owner: nn.Module, parameter_name: str) -> None:
        """Raises ValueError where the parameter cannot be adapted."""
        parameter = owner._parameters.get(parameter_name)
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            raise ValueError(
                f"target_parameters: {name} is no floating-point parameter of two dimensions or more; leave it out"
            )

    @property
    def target(self) -> str:
        """The parameter's name in the base model."""
        return f"{self.name}.weight" if self.parameter_name == "weight" else self.name

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return self.get_base_layer()

    @property
    def shape(self) -> tuple[int, int]:
        parameter = self.owner.get_parameter(self.parameter_name)
        return parameter.numel() // parameter.shape[-1], parameter.shape[-1]

    def _make(self, **options: Any) -> AdapterLinear:
        fan_ins = {weight.name: weight.fan_in for weight in own_matrices(self.owner)}
        adapter = AdapterWeight(self.owner, self.parameter_name, fan_in=fan_ins.get(self.parameter_name), **options)
        adapter.name_in_base = f"{self.target.rpartition('.')[0]}.{PREFIX}{self.parameter_name}"
        return adapter

    def _frozen_matrix(self) -> Tensor:
        return self.owner.get_parameter(self.parameter_name).detach().view(self.shape)

    def _set_weight(self, matrix: Tensor) -> None:
        parameter = self.owner.get_parameter(self.parameter_name)
        parameter.data = matrix.view(parameter.shape)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the module computes with the composed parameter."""
        if adapter_names is not None:
            raise ValueError(f"adapter_names: {self.name} is a parameter, of which a batch has one; use one adapter")
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = None if self.disable_adapters or self.merged else self.active
        if name is None:
            return self.base_layer(*args, **kwargs)
        parameters: dict[str, Any] = self.owner._parameters
        composed, own = self.rigsa_adapter[name](), parameters[self.parameter_name]
        parameters[self.parameter_name] = composed
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parameters[self.parameter_name] = own

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module, out of all the wrappers around it. PEFT asks the outermost."""
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge, adapter_names)
            module = module.base_layer
        return module

    def __getattr__(self, name: str) -> Any:
        """The module's other attributes, which code around it reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class Conv1DLinear(ParamWrapper):
    """Around GPT-2's ``Conv1D``, which PEFT counts among the linear layers, as the name says."""


def _show_the_frozen_weight(layer: Any, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """A state shows W0, in a matrix of its own where passes write into the weight."""
    key = f"{prefix}base_layer.weight"
    if key in state and not isinstance(state[key], nn.Parameter):
        for adapter in layer.adapters.values():
            if adapter.in_place_weight is not None:
                state[key] = adapter.in_place_weight.frozen()
