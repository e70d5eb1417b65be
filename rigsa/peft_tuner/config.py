"""`RigsaConfig`: what PEFT is told about an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from rigsa.base import SAMPLES, Fingerprint
from rigsa.encoding import Encoding, is_encoding
from rigsa.peft_tuner.card import write_peft_card
from rigsa.record import expect_fields
from rigsa_kernels.linear import ALPHA_INIT, Numerics
from rigsa_kernels.tiles import tile_size

Init = Literal["random", "magnitude", "gradient"]
FORMAT = 1
"""The layout of ``adapter_config.json`` and ``adapter_model.safetensors``. It counts changes that readers must know."""
VALUES_DTYPES = (None, "float32", "bfloat16", "float16", "float64")


@dataclass
class RigsaConfig(PeftConfig):
    """Gated sparse adapters as a method of PEFT.

    Args:
        target_modules: which linear layers, as in any configuration of PEFT; all but the head by default.
        target_parameters: parameters that are no layers, such as the experts of a mixture: names or their endings.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`.
        density: share of each layer's entries that is free, in (0, 1]; all of them by default.
        tile: free whole tiles: ``32`` for squares, ``"16x64"``, ``"rows"`` or ``"columns"``, as in `rigsa.prune`;
            `density` is then the share of the tiles.
        init: which entries: ``"random"`` draws them from the seed and the layer's name, ``"magnitude"`` takes those
            where the pretrained weights are largest, ``"gradient"`` those where the loss of `batches` is steepest.
        batches: of ``"gradient"``, and of nothing else: dictionaries that the model takes and returns a loss for. They
            are asked when the adapter is made, let go then, and not saved. `rigsa.gradient_ticket`, called on the
            model that `get_peft_model` returns, takes any loss and other scores.
        seed, alpha_init, init_scale, numerics, in_place: as in `rigsa_kernels.GatedSparseLinear`.
        values_dtype: the name of a dtype, as there. PEFT's `autocast_adapter_dtype` does not change it.
        layers: written when an adapter is saved: by layer its shape, the number of its free entries and how they are
            encoded, so that a model that loads it can make room, and the fingerprint of its base (`rigsa.base`). Leave
            it alone.
        format: the version of the layout of files. Leave it alone.

    Raises:
        ValueError: an option is out of range, or a file has a format of a newer version of this package.
    """

    target_modules: list[str] | str | None = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    density: float | None = None
    tile: str | int | None = None
    init: Init = "random"
    batches: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    seed: int = 0
    alpha_init: float = ALPHA_INIT
    init_scale: float = 1.0
    values_dtype: str | None = None
    numerics: Numerics = "auto"
    in_place: bool = True
    layers: dict[str, Any] | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("RIGSA")
        if self.format != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {self.format!r}; the adapter was saved by another version of rigsa "
                "(pip install -U rigsa)"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in ("density", "alpha_init", "init_scale"):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number and not (name == "density" and value is None):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if not isinstance(self.in_place, bool):
            raise ValueError(f"in_place: expected True or False, got {self.in_place!r}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density: expected more than 0 and at most 1, got {self.density}")
        if self.tile is not None:
            tile_size(self.tile, (1, 1))
            if self.density is None:
                raise ValueError(f"tile: expected none without a density, got {self.tile!r}")
        if self.init not in get_args(Init):
            raise ValueError(f"init: expected one of {', '.join(get_args(Init))}, got {self.init!r}")
        is_new = self.layers is None
        if is_new and self.init == "gradient" and (self.batches is None or self.density is None):
            raise ValueError("init: 'gradient' needs batches and a density, got neither or one of them")
        if is_new and self.init == "magnitude" and self.density is None:
            raise ValueError("init: 'magnitude' needs a density, got none, by which every entry is free")
        if self.batches is not None and self.init != "gradient":
            raise ValueError(f"batches: expected none beside init={self.init!r}, which does not ask them")
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, got {self.seed}")
        if not math.isfinite(self.alpha_init):
            raise ValueError(f"alpha_init: expected a finite number, got {self.alpha_init}")
        if not 0 <= self.init_scale < math.inf:
            raise ValueError(f"init_scale: expected a finite number, 0 or more, got {self.init_scale}")
        if self.values_dtype not in VALUES_DTYPES:
            expected = ", ".join(map(str, VALUES_DTYPES))
            raise ValueError(f"values_dtype: expected one of {expected}, got {self.values_dtype!r}")
        if self.numerics not in get_args(Numerics):
            raise ValueError(f"numerics: expected one of {', '.join(get_args(Numerics))}, got {self.numerics!r}")
        for layer, found in (self.layers or {}).items():
            saved_layer(layer, found)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the values; None leaves it to the layer."""
        return None if self.values_dtype is None else getattr(torch, self.values_dtype)

    def note_layers(self, layers: dict[str, Any]) -> None:
        """Have `layers` stand in the file that this configuration is saved to. In memory they would mean a load."""
        self.__dict__["_layers_to_save"] = layers

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT, with a card beside (`rigsa.peft_tuner.card`) where an adapter is saved."""
        super().save_pretrained(save_directory, **kwargs)
        layers = self.__dict__.get("_layers_to_save")
        if layers is not None:
            write_peft_card(Path(save_directory), self.base_model_name_or_path or "", layers)

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        saved = {one.name: deepcopy(getattr(self, one.name)) for one in fields(self) if one.name != "batches"}
        return saved | {"layers": self.__dict__.get("_layers_to_save", self.layers)}


@dataclass(frozen=True)
class SavedLayer:
    """What a saved configuration says of one layer.

    Attributes:
        shape: N and K.
        entries, encoding: how many are free, and how they are written (`rigsa.encoding`).
        base: of the frozen weight.
    """

    shape: tuple[int, int]
    entries: int
    encoding: Encoding
    base: Fingerprint


_TYPES: dict[str, Any] = {"shape": list, "entries": int, "encoding": str, "base": dict}


def saved_layer(layer: str, found: Any) -> SavedLayer:
    """Raises ValueError where a field is missing, unknown or out of its range."""
    expect_fields(f"layers: {layer}", found, _TYPES)
    expect_fields(f"layers: {layer}: base", found["base"], {"sample": str, "nf4": bool})
    shape, sample = found["shape"], found["base"]["sample"]
    is_shape = len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape)
    weights = math.prod(shape) if is_shape else 0
    checks = {
        "shape": is_shape,
        "entries": 0 <= found["entries"] <= min(weights, 2**31 - 1)
        and (found["encoding"] != "dense" or found["entries"] == weights),
        "encoding": is_encoding(found["encoding"]),
        "base": re.fullmatch(f"[0-9a-f]{{{4 * SAMPLES}}}", sample) is not None,
    }
    for name, holds in checks.items():
        if not holds:
            raise ValueError(f"layers: {layer}: {name}: {str(found[name])[:100]} is out of range")
    return SavedLayer((shape[0], shape[1]), found["entries"], found["encoding"], Fingerprint(**found["base"]))
