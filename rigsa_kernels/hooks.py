"""What other code has attached to a layer, carried over to the layer that takes its place.

Hooks (forward, backward, state dict) go with their tables, so that the handles that remove them stay valid. A `forward`
of the instance's own is another matter: it computes something that the layer in its place does not. Only the one that
accelerate sets around a layer's own `forward`, to move inputs between devices, can be carried.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn as nn

TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""Where PyTorch keeps the hooks of a module."""
AROUND = ("_hf_hook", "_old_forward", "forward")
"""Where accelerate keeps its hook, the `forward` below it and the `forward` that runs both."""


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module` has a `forward` of its own, not its class's, that another layer in its place could not run."""
    own = module.__dict__.get("forward")
    return own is not None and not _is_of_class(module, own) and not _is_around(module)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have `new`, which takes the place of `old`, run the hooks of `old`: those it has now and those it gets later.

    Both share their tables of hooks from here on. Only one of them stands in a model at a time.

    Raises:
        ValueError: `old` has a `forward` of its own (`has_own_forward`). Nothing is changed then.
    """
    if has_own_forward(old):
        raise ValueError("forward: expected the layer's class to define it, got one set on the instance; remove it")
    for table in TABLES:
        new.__dict__[table] = old.__dict__[table]
    new._is_full_backward_hook = old._is_full_backward_hook
    _rebind(new._load_state_dict_pre_hooks, new)
    for name in AROUND:
        new.__dict__.pop(name, None)
    if _is_around(old):
        around: Any = old.__dict__
        new.__dict__["_hf_hook"], new.__dict__["_old_forward"] = around["_hf_hook"], new.forward
        forward = functools.partial(around["forward"].func, new)
        new.__dict__["forward"] = functools.update_wrapper(forward, new.forward)


def _is_of_class(module: nn.Module, forward: Any) -> bool:
    """accelerate leaves the method of the class behind where it takes its hook away."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def _is_around(module: nn.Module) -> bool:
    """Whether accelerate runs a hook around the `forward` of the module's class."""
    hook, below, forward = (module.__dict__.get(name) for name in AROUND)
    return (
        hook is not None
        and _is_of_class(module, below)
        and isinstance(forward, functools.partial)
        and forward.args == (module,)
        and not forward.keywords
    )


def _rebind(hooks: dict[int, Any], module: nn.Module) -> None:
    """PyTorch binds these hooks to the module that they were registered on."""
    for number, hook in hooks.items():
        if getattr(hook, "with_module", False):
            hooks[number] = type(hook)(hook.hook, module)
