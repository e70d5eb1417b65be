"""`RigsaModel`: what PEFT puts around a model. It finds the layers, and adds, combines, merges and saves adapters."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import torch.nn as nn
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor

from rigsa.adapters import Rule
from rigsa.base import base_differences, fingerprint
from rigsa.encoding import choose_encoding
from rigsa.errors import RigsaError
from rigsa.peft_format import PREFIX
from rigsa.peft_tuner.config import saved_layer
from rigsa.peft_tuner.gradient_init import take_gradient_ticket
from rigsa.peft_tuner.layer import BASE, Conv1DLinear, ParamWrapper, RigsaLayer, RigsaLinear
from rigsa.peft_tuner.targets import check_names
from rigsa_kernels.in_place import Peers
from rigsa_kernels.patched import (
    HEAD,
    LIGER_READS_THE_HEAD,
    heads_that_liger_reads,
    refuse_liger_later,
    refuse_unsloth,
)
from rigsa_kernels.selection import read_by_the_parent

RULES = {"linear": "sum", "sum": "sum", "ties": "ties"}
"""PEFT's names for ways to combine adapters, and those of `rigsa.Adapters.combine`."""


class RigsaModel(BaseTuner):
    """A model with gated sparse adapters. `peft.get_peft_model` makes it."""

    prefix = PREFIX
    tuner_layer_cls = RigsaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's declaration

    def _layers(self) -> Iterator[RigsaLayer]:
        return layers_of(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.__dict__["_tied"] = {number for number, times in uses.items() if times > 1}
        refuse_unsloth(model)
        self.__dict__["_read"] = read_by_the_parent(model)
        self.__dict__["_read_by_liger"] = heads_that_liger_reads(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, but a name that fits nothing is an error, and any error leaves the model as it was."""
        config: Any = self.peft_config[adapter_name]
        self._check_adapter_name(model, adapter_name)
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_layers(self.peft_config[adapter_name], adapter_name)
            if config.init == "gradient" and config.layers is None and self._twin(adapter_name) is None:
                with self._alone(adapter_name):
                    take_gradient_ticket(self.model, config)
        except BaseException:
            self._take_out(adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        config.layers = None  # the layers have made room; in memory the configuration is that of a new adapter

    def _twin(self, adapter_name: str) -> str | None:
        """Another adapter with the very same configuration, as trainers make one for their reference."""
        config = self.peft_config[adapter_name]
        return next(
            (name for name, other in self.peft_config.items() if other is config and name != adapter_name), None
        )

    @contextmanager
    def _alone(self, adapter_name: str) -> Iterator[None]:
        """Inside, `adapter_name` is the active adapter; then those that were, with the parameters that they train."""
        before = list(self.active_adapters)
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.set_adapter(adapter_name)
        try:
            yield
        finally:
            if before != [adapter_name]:
                self.set_adapter(before)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    @staticmethod
    def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
        """PEFT finds the tensors of an adapter by its name, wherever in their names it stands."""
        for name, module in model.named_modules():
            own = isinstance(module, RigsaLayer | AuxiliaryTrainingWrapper) or PREFIX in name
            if not own and ".modules_to_save." not in name and adapter_name in name.split("."):
                raise ValueError(
                    f"adapter_name: {adapter_name!r} is part of the name of a module, {name}; take another"
                )

    def _check_layers(self, config: Any, adapter_name: str) -> None:
        """Raises ValueError where names or layers of a saved adapter are missing; warns where the base is another."""
        here = {layer.name: layer for layer in self._layers() if adapter_name in layer.rigsa_adapter}
        if config.layers is None:
            parameters = [layer.target for layer in here.values() if isinstance(layer, ParamWrapper)]
            check_names(config, self.model, parameters, here)
            return
        saved = {name: saved_layer(name, found) for name, found in (config.layers or {}).items()}
        missing = [name for name in saved if name not in here]
        if missing:
            some = ", ".join(missing[:3])
            raise ValueError(f"layers: {len(missing)} of the adapter's layers are not in this model ({some}, ...)")
        prints = {name: layer.base for name, layer in saved.items()}
        places = {name: here[name].adapters[adapter_name] for name in saved}
        differences = base_differences("", prints, self.model, places)
        if differences:
            warnings.warn(f"the adapter was trained on another base model: {'; '.join(differences)}", stacklevel=3)

    def _take_out(self, adapter_name: str) -> None:
        for name, layer in reversed(list(self.model.named_modules())):  # inner wrappers first
            parent, _, child = name.rpartition(".")
            if isinstance(layer, RigsaLayer):
                if adapter_name in layer.rigsa_adapter:
                    layer.delete_adapter(adapter_name)
                if not layer.rigsa_adapter:
                    setattr(self.model.get_submodule(parent), child, layer.base_layer)
            elif isinstance(layer, ModulesToSaveWrapper):
                layer.delete_adapter(adapter_name, [one for one in layer.active_adapters if one != adapter_name])
                if not layer.modules_to_save:
                    setattr(self.model.get_submodule(parent), child, layer.original_module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        peers = self.__dict__.setdefault("_peers", Peers())
        twin = self._twin(adapter_name)
        is_there = isinstance(target, RigsaLayer)
        if parameter_name is not None:
            is_there = isinstance(target, ParamWrapper) and target.parameter_name == parameter_name
        if is_there:
            target.update_layer(adapter_name, peft_config, peers, twin)  # type: ignore[operator]
            return
        layer = self._new_layer(target, current_key, parameter_name)
        layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, peers)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, name: str, parameter_name: str | None) -> RigsaLayer:
        """What is put in the place of `target`. Raises ValueError where it cannot be adapted."""
        tied = self.__dict__["_tied"]
        owner_name = name if parameter_name is None else name.rpartition(".")[0]
        if owner_name in self.__dict__["_read"]:
            raise ValueError(
                f"target: the module around {owner_name} reads its weight and does not call it, so an adapter there "
                "would have no effect; leave it out, or adapt the model with rigsa.replace_linears"
            )
        if owner_name in self.__dict__["_read_by_liger"]:
            raise ValueError(f"target: {LIGER_READS_THE_HEAD.format(owner_name)}")
        if parameter_name is None and type(target).__name__ == "Conv1D":
            return Conv1DLinear(target, name, False, "weight")
        if parameter_name is not None:
            owner = target.get_base_layer() if isinstance(target, RigsaLayer) else target
            ParamWrapper.check(name, owner, parameter_name)
            return ParamWrapper(target, name.removesuffix(".weight"), False, parameter_name)
        RigsaLinear.check(name, target)
        return RigsaLinear(target, name, id(target.weight) in tied)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Layers of ours are on the right device, and share what PEFT would copy."""
        setattr(parent, child_name, new_module)
        if child_name == HEAD:
            refuse_liger_later(parent, isinstance(new_module, RigsaLayer))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values have the dtype that the configuration says, and gates always float32 or float64."""

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        """Raises ValueError where a layer cannot be merged, before any of them is."""
        for layer in self._layers():
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name in layer.rigsa_adapter and name not in layer.merged_adapters:
                    layer.check_merge(name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT. `unmerge_adapter` brings the weights back to the bit.

        Raises:
            ValueError: as `RigsaLayer.merge`, before any layer is changed.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        for layer in self._layers():
            layer.restore_weight()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
    ) -> None:
        """Make one adapter of several, as `rigsa.Adapters.combine` does: its gates are 1.

        Args:
            adapters: names of those to combine.
            weights: as many numbers.
            adapter_name: of the new one, which is not active.
            combination_type: ``"linear"`` adds them up; ``"ties"`` is TIES-Merging.
            density: under ``"ties"``, the share of each adapter's entries that is kept.

        Raises:
            ValueError: a name is taken or unknown, an argument is out of range, adapters have modules of their own
                (modules_to_save), or a layer would be left empty. The model is unchanged.
        """
        if combination_type not in RULES:
            raise ValueError(f"combination_type: expected linear or ties, got {combination_type!r}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} is there already")
        if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            raise ValueError(f"weights: expected one for each of the adapters, which differ, got {adapters}, {weights}")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"adapters: expected some of {', '.join(self.peft_config)}, got {name!r}")
            if getattr(self.peft_config[name], "modules_to_save", None):
                raise ValueError(f"adapters: {name!r} has modules_to_save, which cannot be combined")
        rule: Any = RULES[combination_type]
        share = 1.0 if density is None else density
        if not 0 < share <= 1 or (rule == "sum" and share != 1) or rule not in get_args(Rule):
            raise ValueError(f"density: expected more than 0 and at most 1, and none for linear, got {density}")
        for weight in weights:
            if not abs(weight) < float("inf") or (rule == "ties" and weight <= 0):
                raise ValueError(f"weights: expected finite numbers (above 0 for ties), got {weight}")
        config: Any = copy.deepcopy(self.peft_config[adapters[0]])
        layers = [layer for layer in self._layers() if any(name in layer.rigsa_adapter for name in adapters)]
        config.init = "random"  # what is drawn is replaced
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.target_modules = {layer.name for layer in layers if type(layer) is not ParamWrapper}
        config.target_parameters = [layer.target for layer in layers if type(layer) is ParamWrapper] or None
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            for layer in self._layers():
                if adapter_name in layer.rigsa_adapter:
                    layer.combine(adapter_name, dict(zip(adapters, weights, strict=True)), rule, share, config)
        except BaseException:
            self._take_out(adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, every layer is given the names of the adapters that compute the rows of a mixed batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: expected a model in evaluation mode, as only one adapter is trained")
        unknown = sorted({name for name in names if name != BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapter_names: expected some of {', '.join(self.peft_config)}, got {unknown[0]!r}")
        beams = kwargs.get("num_beams") or 1
        names = [name for name in names for _ in range(beams)]
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, RigsaLayer | AuxiliaryTrainingWrapper):
                    hook = module.register_forward_pre_hook(partial(_give_names, names=names), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors; the configuration takes note of its layers, as it is saved next."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        adapters = {
            layer.name: layer.adapters[adapter_name] for layer in layers_of(model) if adapter_name in layer.adapters
        }
        for name, adapter in adapters.items():
            if not bool(adapter.rigsa_values.isfinite().all()) or not bool(adapter.rigsa_alpha.isfinite().all()):
                raise RigsaError(f"save: expected finite numbers, got others in {name}")
        config.note_layers(
            {
                name: {
                    "shape": list(adapter.pattern.shape),
                    "entries": adapter.pattern.nnz,
                    "encoding": choose_encoding(adapter.pattern),
                    "base": asdict(fingerprint(adapter)),
                }
                for name, adapter in adapters.items()
            }
        )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Which tensors there are depends on how a pattern is encoded, so the names are made and not looked up."""
        here = {
            f"{name}.rigsa_adapter": f"{name}.rigsa_adapter.{adapter_name}"
            for name, module in model.named_modules()
            if isinstance(module, RigsaLayer) and adapter_name in module.rigsa_adapter
        }
        named = {}
        for key, tensor in state_dict.items():
            owner, _, part = key.rpartition(".")
            place = here.get(owner) or here.get(owner.removeprefix("base_model.model."))
            named[key if place is None else f"{place}.{part}"] = tensor
        return named


def layers_of(model: nn.Module) -> Iterator[RigsaLayer]:
    """The layers of the method in `model`."""
    return (module for module in model.modules() if isinstance(module, RigsaLayer))


def _give_names(_: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}
