"""AdamW over the free entries of gated sparse layers.

On a CPU, parameters and moments in one of float32 and float64 go through PyTorch's own fused AdamW; everything else,
and everything on a GPU, through ``torch.ops.rigsa.adamw_`` (`rigsa_kernels.adamw`). Bytes that a step moves for each
value, gradient and moments included:

===========  ========  =======  =====================  ==============
parameters   gradient  moments  read + write           resident state
===========  ========  =======  =====================  ==============
float32      float32   float32  16 + 12 = 28           8
bfloat16     bfloat16  float32  12 + 10 = 22           8
bfloat16     bfloat16  bfloat16  8 +  6 = 14           4
bfloat16     bfloat16  int8      6 +  4 = 10           2
===========  ========  =======  =====================  ==============

(int8 moments move 1/32 more for each direction of their scales: 8 bytes a block of 256.)

Parameters that FSDP2 sharded (DTensors) are updated shard by shard, without communication; moments are sharded as they
are. A shard draws random bits and cuts blocks of its own, so float32 states alone have the bits of whole parameters.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ._ops import ops as operators
from .adamw import check_options, hyper_parameters, move_codes, random_key
from .format import carry
from .in_place import after_step, living_layers
from .launches import (
    Launch,
    Members,
    Remembered,
    StateDtype,
    check_state,
    launches_of,
    local_part,
)
from .library import on_first_use
from .linear import GatedSparseLinear
from .replace import gated_linears
from .roles import GATE, VALUES, parameters_called
from .switching import Switch

_update_on_cuda = on_first_use("triton_adamw.update_")

PENDING_BYTES = 4 << 20
"""Gradients that `stepping_in_backward` collects, at least, before it updates. To update so many, a GPU moves some 30
MB, which takes it about as long as the host takes to launch the update: fewer would be bound by the host."""
MOST_UPDATES = 24
"""Updates that `stepping_in_backward` makes of a whole model, about. Each takes the host 100 to 150 µs, however large
it is, and the gradients that wait for it take this part of the memory of all gradients."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over a gated sparse adapter, in one fused pass.

    A pruned entry has no storage: neither decay, nor a stale moment, nor clipping can move it, and the optimiser's
    state is as large as the free entries. Gates are not decayed unless asked, as decay would pull them to the closed
    position they started from.

    The state of a parameter, ``optimizer.state[parameter]``, is empty until its first step and then holds:

    ================  ======================================  ====================================================
    ``step``          int, from 1                             steps made; the host's, so a GPU is never asked for it
    ``exp_avg``       the parameter's shape; float32          first moment
                      (float64, bfloat16 or int8 codes)
    ``exp_avg_sq``    the parameter's shape; float32          second moment
                      (float64, bfloat16 or uint8 codes)
    ``scales``        float32 ``[2, ceil(numel / 256)]``      only beside codes: the scale of each block of 256
                                                              values, first those of exp_avg
    ================  ======================================  ====================================================

    All of it lies contiguous on the parameter's device. Codes are decoded by `rigsa_kernels.adamw.decode_exp_avg` and
    `decode_exp_avg_sq`. Of a DTensor, moments are DTensors placed as it is, and scales one with a row for each shard.

    Args:
        params: a model with gated sparse layers, whose trainable parameters are sorted into groups by
            `parameter_groups`; or its named parameters, ``(name, parameter)``, sorted in the same way; or a list of
            groups as in any ``torch.optim`` class, each with its own options, where gates that stand in one group
            with others get a group of their own. Parameters are float32 or bfloat16 (float64 on a CPU); bfloat16 is
            rounded stochastically.
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of the values; the paper's 1.0 (section 4.4) by default.
        alpha_lr: step size of the gates; that of the others by default.
        alpha_weight_decay: of the gates; 0 by default.
        other_weight_decay: of what is trained beside the gated layers, such as a new head or the norms, which the
            paper's 1.0 would pull to zero: 0 by default. None gives them that of the values. It does not apply to a
            list of groups, which have their own.
        state_dtype: of the moments: ``"float32"`` (float64 beside float64 parameters), ``"bfloat16"`` (rounded
            stochastically) or ``"int8"`` (codes with a scale for every 256 values: Dettmers et al. 2022). 8, 4 and 2
            bytes a value. Gates keep float32: they are one value each.
        seed: of the stochastic rounding. It is saved with the state, so a resumed run repeats to the bit.

    Raises:
        ValueError: an option out of range, or nothing to train; or no gated layer holds any of the trainable parameters
            of a model, or of the named ones. A list of groups may be of any parameters.

    Under ``transformers.Trainer`` pass ``optimizers=(MaskedAdamW(model, ...), None)``, or
    ``optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, ...})``, which makes it when training begins. Without
    ``"model"`` the Trainer passes groups of nameless parameters: gates are told there, too, but the weight decay of all
    else is that of the ``TrainingArguments``.
    """

    asks_layers = True
    """Whether a step finds parameters that have left the model (`rigsa_kernels.roles`)."""

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1.0,
        *,
        alpha_lr: float | None = None,
        alpha_weight_decay: float | None = None,
        other_weight_decay: float | None = 0.0,
        state_dtype: StateDtype = "float32",
        seed: int = 0,
    ) -> None:
        groups = _groups(params, lr, alpha_lr, alpha_weight_decay, other_weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"state_dtype": state_dtype, "seed": seed})
        self._remembered: Remembered = {}
        self._model: Callable[[], nn.Module | None] = lambda: None
        if isinstance(params, nn.Module):
            self._model, self._places = weakref.ref(params), _places(params.named_modules(), self.param_groups)
            layers = list(gated_linears(params).values())
        else:
            layers = _layers_of(self.param_groups)
            names = [(f"a {layer.out_features} x {layer.in_features} layer", layer) for layer in layers]
            self._places = _places(names, self.param_groups)
        self._switch = Switch(layers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, which leave out what is only remembered."""
        super().__setstate__(state)
        self.__dict__.setdefault("_remembered", {})
        self.__dict__.setdefault("_model", lambda: None)
        self.__dict__.setdefault("_places", [])
        self.__dict__.setdefault("_switch", Switch([]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any ``torch.optim`` class.

        Raises:
            ValueError: an option of the group is out of range.
        """
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            ValueError: a gradient, a state or an option that does not fit, or parameters that left the model which
                this optimiser was made with; nothing is changed then.
            RuntimeError: the step would be captured into a CUDA graph, which would repeat its learning rate, its step
                count and its random bits for ever.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_places()
        _refuse_capture()
        launches = self._launches()
        self._switch.before_step()
        for launch in launches:
            self._run(launch)
        return loss

    @torch.no_grad()
    def step_early(self, positions: Sequence[Sequence[int]]) -> None:
        """The update that `step` would make of some parameters, before the others: see `stepping_in_backward`.

        Only what has a gradient is updated; the gradient is left to the caller. Hooks on steps are not called, as the
        step is not done.

        Args:
            positions: of the parameters within each group.

        Raises:
            ValueError, RuntimeError: as `step`.
        """
        _refuse_capture()
        launches = self._launches(positions)
        for launch in launches:
            self._run(launch)
        after_step(param for launch in launches for param in launch.owned)

    def _check_places(self) -> None:
        """Raises ValueError where a layer of the model holds another parameter now than the one given to us.

        Of layers that nobody else holds any more there is nothing to check.
        """
        model_lives = self._model() is not None
        groups = [group["params"] for group in self.param_groups]
        lost = [
            name
            for layer, attribute, name, index, at in self._places
            if (
                model_lives
                if (module := layer()) is None
                else module._parameters.get(attribute) is not groups[index][at]
            )
        ]
        if lost:
            raise ValueError(
                f"params: {len(lost)} of {len(self._places)} parameters are no longer those of the model "
                f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}): a layer took another pattern, loaded "
                "another parameter, or was replaced; make a new MaskedAdamW(model)"
            )

    def _launches(self, chosen: Sequence[Sequence[int]] | None = None) -> list[Launch]:
        """What to run, checked as a whole before the first of it runs.

        Args:
            chosen: positions of parameters in each group; all that have a gradient by default.
        """
        launches = []
        number = 0
        for index, group in enumerate(self.param_groups):
            _check_options(group)
            members = Members(index, group, number, None if chosen is None else chosen[index])
            launches += launches_of(members, self.state, self._remembered)
            number += len(group["params"])
        return launches

    def _run(self, launch: Launch) -> None:
        options, step = launch.options, launch.step
        lr, (beta1, beta2), eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
        columns = [launch.params, launch.grads, launch.exp_avgs, launch.exp_avg_sqs]
        if _is_for_pytorch(columns):
            steps = [torch.tensor(float(step))] * len(launch.params)
            torch._fused_adamw_(
                launch.params, launch.grads, launch.exp_avgs, launch.exp_avg_sqs, [], steps,
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        elif launch.addresses is not None and _has_kernels(launch.params[0].device):
            hyper = hyper_parameters(lr, beta1, beta2, eps, weight_decay, step)
            key = random_key(options["seed"], step)
            _update_on_cuda([*columns, launch.scales], launch.addresses, launch.numbers, hyper, key, launch.held)
        else:
            operators.adamw_(
                *columns, launch.scales, launch.numbers,
                lr, beta1, beta2, eps, weight_decay, step, options["seed"],
            )  # fmt: skip
        torch.autograd.graph.increment_version(launch.params)
        for state in launch.states:
            state["step"] = step
        if step == 1:
            self.state.update(zip(launch.owned, launch.states, strict=True))

    @torch.no_grad()
    def move_state(self, param: Tensor, places: Tensor) -> None:
        """Carry the moments of `param` along, whose entries have changed places; those of new entries start at zero.

        They keep their bits, but for 8-bit ones, which share a block's scale with others now and are rounded again, as
        in a step. The step count stays, so the moments of a new entry are not corrected for their zero start.

        Args:
            param: not a DTensor. Nothing happens where it has made no step yet.
            places: int64 ``[numel]``, as `GatedSparseLinear.move_pattern` returns them.
        """
        state = self.state.get(param, {})
        if not state:
            return
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        if "scales" not in state:
            for moment in (exp_avg, exp_avg_sq):
                moment.copy_(carry(moment, places))
            return
        seeds = {id(other): group["seed"] for group in self.param_groups for other in group["params"]}
        number = list(seeds).index(id(param))
        move_codes(exp_avg, exp_avg_sq, state["scales"], places, number, state["step"], seeds[id(param)])

    def state_dict(self) -> dict[str, Any]:
        """As in any ``torch.optim`` class; where 16-bit layers are `auto` on a GPU, with the decisions about them."""
        state, numerics = super().state_dict(), self._switch.state()
        return state if numerics is None else state | {"numerics": numerics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any ``torch.optim`` class, but what is loaded keeps its dtype, and is checked and copied.

        PyTorch casts state to the dtype of its parameter, which would turn float32 moments and scales beside bfloat16
        parameters into bfloat16, and codes into floats.

        Raises:
            ValueError: groups or options that do not fit, or a state that is not one of its parameter (the state of
                another pattern has another shape); nothing is changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}
        numerics = state_dict.get("numerics")
        self._switch.check(numerics)

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(self._loaded(final))

        hook = self.register_load_state_dict_pre_hook(check)  # the last one: others may change what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self.state.update(loaded)
        self._switch.load(numerics)
        self._remembered.clear()
        for group in self.param_groups:  # a state of torch.optim.AdamW has no options of ours
            group |= {name: value for name, value in self.defaults.items() if name not in group}

    def _loaded(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Each parameter's state out of `state_dict`, checked, on the parameter's device."""
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            return {}  # PyTorch names what does not fit
        loaded = {}
        for index, (group, own) in enumerate(zip(saved, self.param_groups, strict=True)):
            _check_group(self.defaults | group)
            names = own.get("param_names")
            for at, (number, param) in enumerate(zip(group["params"], own["params"], strict=True)):
                found = state_dict["state"].get(number)
                if found:
                    name = f"state of params[{at}] of group {index}" + (f" ({names[at]})" if names else "")
                    loaded[param] = _checked_state(name, param, found)
        return loaded


def _checked_state(name: str, param: Tensor, found: dict[str, Any]) -> dict[str, Any]:
    """A copy of `found` on the device of `param`, its step count an int."""
    required = {"step", "exp_avg", "exp_avg_sq"}
    if not required <= set(found) <= required | {"scales"}:
        raise ValueError(f"{name}: expected step, exp_avg, exp_avg_sq and beside codes scales, got {', '.join(found)}")
    step = found["step"]
    count = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(count, int | float) or not 1 <= count < 2**63 or count != int(count):
        raise ValueError(f"{name}: expected a step count from 1, got {step!r}")
    state = {
        key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
        for key, value in found.items()
        if key != "step"
    }
    check_state(name, param, state["exp_avg"], state["exp_avg_sq"], state.get("scales"))
    return state | {"step": int(count)}


@contextlib.contextmanager
def stepping_in_backward(optimizer: MaskedAdamW) -> Iterator[None]:
    """Inside, `backward` updates parameters soon after their gradients are complete, and frees the gradients.

    Gradients are collected until they take `PENDING_BYTES`, or one part in `MOST_UPDATES` of what all of them would
    take where that is more; those of one layer can come on top. The bits are those of an ordinary step, as no
    parameter's update looks at another's gradient; that is why there can be no clipping, and one micro-batch a step
    only. The `step` that follows updates what is left.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    everything = sum(local_part(parameter).nbytes for params in groups for parameter in params)
    enough = max(PENDING_BYTES, everything // MOST_UPDATES)
    pending: list[set[int]] = [set() for _ in groups]  # of each group, positions that have a gradient
    held = [0] * len(groups)  # and bytes of those gradients

    def collect(index: int, at: int, parameter: Tensor) -> None:
        pending[index].add(at)
        held[index] += local_part(cast(Tensor, parameter.grad)).nbytes
        if sum(held) >= enough:
            update([size * len(groups) >= enough for size in held])  # gates wait, which hold next to nothing

    def update(chosen: list[bool]) -> None:
        now = [sorted(positions) if own else [] for positions, own in zip(pending, chosen, strict=True)]
        optimizer.step_early(now)
        for index, positions in enumerate(now):
            for position in positions:
                groups[index][position].grad = None
            if positions:
                forget(index)

    def forget(index: int) -> None:
        pending[index].clear()
        held[index] = 0

    def forget_all(*_: Any) -> None:
        for index in range(len(groups)):
            forget(index)

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(collect, index, at))
        for index, params in enumerate(groups)
        for at, parameter in enumerate(params)
    ]
    hooks.append(optimizer.register_step_post_hook(forget_all))
    try:
        yield
    finally:
        for hook in hooks:  # the gates live on in the next level, which has an optimiser of its own
            hook.remove()


def _refuse_capture() -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "MaskedAdamW: expected no CUDA graph capture, as the learning rate, the step count and the random bits of "
            "a captured step would be repeated in every replay; capture forward and backward alone and step outside"
        )


def _has_kernels(device: torch.device) -> bool:
    """Whether updates of tensors in memory run in Triton kernels there."""
    return device.type == "cuda"


def _check_options(options: dict[str, Any]) -> None:
    if len(options["betas"]) != 2:
        raise ValueError(f"betas: expected two numbers, got {options['betas']}")
    beta1, beta2 = options["betas"]
    check_options(options["lr"], beta1, beta2, options["eps"], options["weight_decay"])


def _check_group(options: dict[str, Any]) -> None:
    _check_options(options)
    if options["state_dtype"] not in get_args(StateDtype):
        expected = ", ".join(get_args(StateDtype))
        raise ValueError(f"state_dtype: expected one of {expected}, got {options['state_dtype']!r}")
    if not isinstance(options["seed"], int) or not -(2**63) <= options["seed"] < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {options['seed']!r}")
    for name in ("maximize", "amsgrad"):
        if options.get(name):
            raise ValueError(f"{name}: expected False, which is all that MaskedAdamW does, got {options[name]!r}")


def _is_for_pytorch(columns: list[list[Tensor]]) -> bool:
    """On a CPU PyTorch's fused AdamW takes them: no rounding but its own, and published results have its bits."""
    dtypes = {column[0].dtype for column in columns}
    return columns[0][0].device.type == "cpu" and dtypes in ({torch.float32}, {torch.float64})


def parameter_groups(
    model: nn.Module,
    alpha_lr: float | None = None,
    alpha_weight_decay: float = 0.0,
    other_weight_decay: float | None = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups: values, what is trained beside the layers, and gates.

    For any ``torch.optim`` class. Under ``transformers.Trainer``, whose own groups would decay the gates, say
    ``optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": parameter_groups(model), "lr": ..., ...})``.

    Args:
        model: with gated sparse layers.
        alpha_lr: step size of the gates; the optimiser's own by default.
        alpha_weight_decay: of the gates.
        other_weight_decay: of what is trained beside the gated layers, such as a new head; None leaves it in one group
            with the values, whose decay it shares, as does a model without gated layers.

    Returns:
        Groups of named parameters, ``(name, parameter)``; one that would be empty is left out.

    Raises:
        ValueError: `model` has no trainable parameter.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("params: the model has no trainable parameter; call replace_linears(model) first")
    others, gates = _gates_apart(_others_apart(named, other_weight_decay), alpha_lr, alpha_weight_decay)
    return others + gates


def _groups(
    params: Any,
    lr: float,
    alpha_lr: float | None,
    alpha_weight_decay: float | None,
    other_weight_decay: float | None,
) -> list[dict[str, Any]]:
    """What `MaskedAdamW` was given, as groups with the gates apart."""
    if isinstance(params, nn.Module):
        alpha_lr = lr if alpha_lr is None else alpha_lr
        groups = parameter_groups(params, alpha_lr, alpha_weight_decay or 0.0, other_weight_decay)
        _require_adapter([item for group in groups for item in group["params"]])
        return groups
    params = list(params)
    if params and all(isinstance(item, tuple) for item in params):
        named = [item for item in params if item[1].requires_grad]
        _require_adapter(named)
        params = _others_apart(named, other_weight_decay)
    if not all(isinstance(item, dict) for item in params):
        raise ValueError(
            "params: expected a model or a list of groups, got bare parameters, among which gates cannot be told "
            "from values; pass the model"
        )
    others, gates = _gates_apart(params, alpha_lr, alpha_weight_decay)
    if not gates and not (alpha_lr is None and alpha_weight_decay is None):
        raise ValueError(
            "alpha_lr, alpha_weight_decay: expected none beside groups without gates, or whose gates are in a group of "
            "their own with an lr; pass the model (under a Trainer as optimizer_cls_and_kwargs=(MaskedAdamW, {'model': "
            "model}))"
        )
    return others + gates


def _require_adapter(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError where no gated layer holds one of these: all weights of a bare model would be trained."""
    ours = parameters_called(GATE) | parameters_called(VALUES)
    if not any(id(parameter) in ours for _, parameter in named):
        got = f"{len(named)} others ({named[0][0]}, ...)" if named else "none that is trainable"
        raise ValueError(
            f"params: expected trainable parameters of gated sparse layers, got {got}; call replace_linears(model) "
            "first, or pass groups, [{'params': ...}], to train other parameters"
        )


def _gates_apart(
    groups: list[dict[str, Any]], alpha_lr: float | None, alpha_weight_decay: float | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of all the rest, and those of gates, with the options given here; gates are not decayed by default.

    A group of gates alone that has an ``lr`` was made for them, and stays among the others as it is.
    """
    given = {} if alpha_lr is None else {"lr": alpha_lr}
    given |= {} if alpha_weight_decay is None else {"weight_decay": alpha_weight_decay}
    others, apart, known = [], [], parameters_called(GATE)
    for group in groups:
        if isinstance(group["params"], set):  # which PyTorch refuses
            others.append(group)
            continue
        params = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
        is_gate = [id(_parameter(item)) in known for item in params]
        if any(is_gate) and not all(is_gate):
            others.append(group | {"params": [item for item, own in zip(params, is_gate, strict=True) if not own]})
            gates = {"params": [item for item, own in zip(params, is_gate, strict=True) if own]}
            apart.append(group | gates | {"weight_decay": 0.0, "state_dtype": "float32"} | given)
        elif any(is_gate) and given and "lr" not in group:
            apart.append(group | {"params": params, "state_dtype": "float32"} | given)
        else:
            others.append(group | {"params": params})
    return others, apart


def _others_apart(named: Sequence[tuple[str, Tensor]], other_weight_decay: float | None) -> list[dict[str, Any]]:
    """Values and gates in one group, what is trained beside them in another one, with its own decay."""
    ours = parameters_called(GATE) | parameters_called(VALUES)
    beside = [item for item in named if id(item[1]) not in ours]
    if other_weight_decay is None or len(beside) in (0, len(named)):
        return [{"params": list(named)}]
    own = [item for item in named if id(item[1]) in ours]
    return [{"params": own}, {"params": beside, "weight_decay": other_weight_decay}]


def _parameter(item: Any) -> Tensor:
    """Of a named parameter or a nameless one."""
    return cast(Tensor, item[1] if isinstance(item, tuple) else item)


def _layers_of(groups: list[dict[str, Any]]) -> list[GatedSparseLinear]:
    """The gated layers whose values are in `groups`, in their order there."""
    numbers = {id(param): number for number, param in enumerate(param for group in groups for param in group["params"])}
    found = {numbers[values]: layer for layer in living_layers() if (values := id(layer.rigsa_values)) in numbers}
    return [found[number] for number in sorted(found)]


def _places(
    modules: Iterable[tuple[str, nn.Module]], groups: list[dict[str, Any]]
) -> list[tuple[weakref.ref[nn.Module], str, str, int, int]]:
    """Where `modules` hold each parameter of `groups`: layer, attribute, qualified name, group and position."""
    positions = {param: (index, at) for index, group in enumerate(groups) for at, param in enumerate(group["params"])}
    return [
        (weakref.ref(module), attribute, f"{prefix}.{attribute}".lstrip("."), *positions[param])
        for prefix, module in modules
        for attribute, param in module._parameters.items()
        if param in positions
    ]
