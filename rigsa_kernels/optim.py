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

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
import torch.nn as nn
from torch import Tensor

from rigsa_kernels.adamw import check_options, move_codes, num_blocks
from rigsa_kernels.format import carry

StateDtype = Literal["float32", "bfloat16", "int8"]


@dataclass
class _Launch:
    """Parameters of one group that can be updated together."""

    options: dict[str, Any]
    step: int
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor (told by its method: its module takes a second to import), else `tensor`."""
    return cast(Tensor, tensor.to_local().detach()) if hasattr(tensor, "to_local") else tensor


def _shard(param: Any) -> tuple[int, int]:
    """``(number, count)`` of the shard that this process holds, which replicas share; (0, 1) of a plain tensor."""
    number, count = 0, 1
    if hasattr(param, "to_local"):
        mesh = param.device_mesh
        for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), param.placements, strict=True):
            if placement.is_shard():
                number, count = number * size + place, count * size
    return number, count


def _new_scales(param: Any) -> Tensor:
    """Of 8-bit moments: two rows of a scale for each block.

    Of a DTensor, whose blocks are cut within shards: a DTensor with one row for each shard, as long as the first, the
    largest one, needs. So it is saved and loaded as moments are, by as many processes.
    """
    if not hasattr(param, "to_local"):
        return torch.zeros(2, num_blocks(param.numel()), device=param.device)
    largest = -(-param.shape[0] // _shard(param)[1]) * param.shape[1:].numel()
    row = torch.zeros(1, 2 * num_blocks(largest), device=param.device)
    return cast(Tensor, type(param).from_local(row, param.device_mesh, param.placements, run_check=False))


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over a gated sparse adapter, in one fused pass.

    A pruned entry has no storage: neither decay, nor a stale moment, nor clipping can move it, and the optimiser's
    state is as large as the free entries. Gates are not decayed unless asked, as decay would pull them to the closed
    position they started from.

    Args:
        params: a model with gated sparse layers (its trainable parameters are sorted into groups by
            `parameter_groups`), or a list of groups as in any ``torch.optim`` class, each with its own options.
            Parameters are float32 or bfloat16 (float64 on a CPU); bfloat16 is rounded stochastically.
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of the values; the paper's 1.0 (section 4.4) by default.
        alpha_lr: step size of the gates; `lr` by default.
        alpha_weight_decay: of the gates.
        state_dtype: of the moments: ``"float32"`` (float64 beside float64 parameters), ``"bfloat16"`` (rounded
            stochastically) or ``"int8"`` (codes with a scale for every 256 values: Dettmers et al. 2022). 8, 4 and 2
            bytes a value. Gates keep float32: they are one value each.
        seed: of the stochastic rounding. It is saved with the state, so a resumed run repeats to the bit.

    Raises:
        ValueError: an option out of range, or nothing to train; in `step`, a gradient that is sparse, or parameters and
            gradients whose dtypes do not fit, before anything is changed.
    """

    def __init__(
        self,
        params: nn.Module | list[dict[str, Any]],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1.0,
        *,
        alpha_lr: float | None = None,
        alpha_weight_decay: float = 0.0,
        state_dtype: StateDtype = "float32",
        seed: int = 0,
    ) -> None:
        if isinstance(params, nn.Module):
            params = parameter_groups(params, lr if alpha_lr is None else alpha_lr, alpha_weight_decay)
        elif not all(isinstance(group, dict) for group in params):
            raise ValueError(
                "params: expected a model or a list of groups, got bare parameters, among which gates cannot be told "
                "from values; pass the model"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"state_dtype": state_dtype, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any ``torch.optim`` class.

        Raises:
            ValueError: an option of the group is out of range.
        """
        options = self.defaults | param_group
        _check_options(options)
        if options["state_dtype"] not in get_args(StateDtype):
            expected = ", ".join(get_args(StateDtype))
            raise ValueError(f"state_dtype: expected one of {expected}, got {options['state_dtype']!r}")
        if not isinstance(options["seed"], int) or not -(2**63) <= options["seed"] < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {options['seed']!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            ValueError: a gradient or an option that does not fit; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for launch in self._launches():
            self._run(launch)
        return loss

    def _launches(self) -> list[_Launch]:
        """What to run together, checked as a whole before the first of it runs."""
        launches: dict[tuple[Any, ...], _Launch] = {}
        number = 0
        for index, group in enumerate(self.param_groups):
            _check_options(group)
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    _check_gradient(f"params[{position}] of group {index}", *map(local_part, (param, param.grad)))
                    step = self.state.get(param, {}).get("step", 0) + 1
                    key = (index, param.device, param.dtype, param.grad.dtype, step)
                    launch = launches.setdefault(key, _Launch(group, step))
                    launch.params.append(param)
                    launch.grads.append(param.grad)
                    launch.numbers.append(number + position + (_shard(param)[0] << 24))
            number += len(group["params"])
        return list(launches.values())

    def _run(self, launch: _Launch) -> None:
        options = launch.options
        states = [self._state_of(param, options["state_dtype"]) for param in launch.params]
        params, grads = ([local_part(tensor) for tensor in tensors] for tensors in (launch.params, launch.grads))
        exp_avgs, exp_avg_sqs = ([local_part(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        scales = [
            local_part(state["scales"]).view(-1)[: 2 * num_blocks(param.numel())].view(2, -1)
            for state, param in zip(states, params, strict=True)
            if "scales" in state
        ]
        lr, (beta1, beta2), eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
        if _is_for_pytorch([*params, *grads, *exp_avgs, *exp_avg_sqs]):
            steps = [torch.tensor(float(launch.step))] * len(states)
            torch._fused_adamw_(
                params, grads, exp_avgs, exp_avg_sqs, [], steps,
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            grads = [grad.contiguous() for grad in grads]
            torch.ops.rigsa.adamw_(
                params, grads, exp_avgs, exp_avg_sqs, scales, launch.numbers,
                lr, beta1, beta2, eps, weight_decay, launch.step, options["seed"],
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)
        for state in states:
            state["step"] = launch.step

    def _state_of(self, param: Tensor, state_dtype: StateDtype) -> dict[str, Any]:
        """exp_avg, exp_avg_sq, scales where they are 8-bit, and step, an int: a GPU is never asked for it."""
        state = cast(dict[str, Any], self.state[param])
        if not state:
            if state_dtype == "int8":
                first, second = torch.int8, torch.uint8
                state["scales"] = _new_scales(param)
            else:
                wide = state_dtype == "float32" and param.dtype == torch.float64
                first = second = torch.float64 if wide else getattr(torch, state_dtype)
            state["exp_avg"] = torch.zeros_like(param, dtype=first)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=second)
        return state

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any ``torch.optim`` class, but what is loaded keeps its dtype.

        PyTorch casts state to the dtype of its parameter, which would turn float32 moments and scales beside bfloat16
        parameters into bfloat16, and codes into floats.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    value = int(value) if name == "step" else value.to(param.device)
                self.state[param][name] = value
        for group in self.param_groups:  # a state of torch.optim.AdamW has no options of ours
            group |= {name: value for name, value in self.defaults.items() if name not in group}


def _check_options(options: dict[str, Any]) -> None:
    if len(options["betas"]) != 2:
        raise ValueError(f"betas: expected two numbers, got {options['betas']}")
    beta1, beta2 = options["betas"]
    check_options(options["lr"], beta1, beta2, options["eps"], options["weight_decay"])


def _check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    wide = (torch.float64,) if param.device.type == "cpu" else ()
    for what, tensor in (("parameter", param), ("gradient", grad)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, *wide):
            expected = "float32 or bfloat16 (float64 on a CPU)"
            raise ValueError(f"{name}: expected a {what} in {expected}, got {tensor.dtype} on {tensor.device}")
    if not param.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous parameter, got strides {list(param.stride())}")
    if grad.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense gradient, got {grad.layout}")
    if grad.shape != param.shape or grad.device != param.device:
        expected = f"{list(param.shape)} on {param.device}"
        raise ValueError(f"{name}: expected a gradient {expected}, got {list(grad.shape)} on {grad.device}")


def _is_for_pytorch(tensors: list[Tensor]) -> bool:
    """On a CPU PyTorch's fused AdamW takes them: no rounding but its own, and published results have its bits."""
    dtype = tensors[0].dtype
    wide = dtype in (torch.float32, torch.float64) and all(tensor.dtype == dtype for tensor in tensors)
    return wide and tensors[0].device.type == "cpu"


def parameter_groups(model: nn.Module, alpha_lr: float, alpha_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trainable parameters of `model`: all but the gates, and a second group of the gates with their own options.

    Raises:
        ValueError: `model` has no trainable parameter.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("params: the model has no trainable parameter; call replace_linears(model) first")
    gates = [item for item in trainable if item[0].rpartition(".")[2] == "rigsa_alpha"]
    values = [item for item in trainable if item[0].rpartition(".")[2] != "rigsa_alpha"]
    options = {"lr": alpha_lr, "weight_decay": alpha_weight_decay, "state_dtype": "float32"}
    return [{"params": values}, *([{"params": gates, **options}] if gates else [])]
