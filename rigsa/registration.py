"""Make PEFT know the method RIGSA.

PEFT's methods are members of an enumeration, and the library offers no way to add one. So the member is added to the
enumeration's own tables, which every reader of them asks: by name, by value, and in turn.

PEFT is imported in the functions, as its import has them called (`rigsa.when_imported`).
"""

from __future__ import annotations

from typing import Any

OLDEST = (0, 21)
"""The first version of PEFT that leaves to a method how its state is saved and loaded."""
NAME = "RIGSA"


def has_support() -> bool:
    """Whether this version of PEFT can carry the method."""
    import peft

    return tuple(int(part) for part in peft.__version__.split(".")[:2]) >= OLDEST


def check_version() -> None:
    """Raises ImportError where PEFT is too old."""
    if not has_support():
        import peft

        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"RigsaConfig: expected peft >= {oldest}, got {peft.__version__}; pip install -U peft")


def register(config_class: type, model_class: type) -> None:
    """Add the method."""
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    tables: Any = PeftType
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    tables._member_map_[NAME] = tables._value2member_map_[NAME] = member
    tables._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
