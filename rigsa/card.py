"""The model card of an exported adapter: what it is, what was measured, how to load it with this package and without.

A card is ``README.md`` beside the files, as model hubs show it, and ``densities.png``: the density of every layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from rigsa.base import base_name
from rigsa.export import Format
from rigsa.files import write_atomically, write_text
from rigsa.inspection import density, plot_densities
from rigsa.state import adapted_layers, unwrap
from rigsa_kernels import __version__

CARD_FILE, FIGURE_FILE = "README.md", "densities.png"
_LIBRARY = {"supertuning": "peft", "shira": "peft", "safetensors": "rigsa", "merged": "transformers"}
_BASE = 'model = AutoModelForCausalLM.from_pretrained("{base}")'
_WITHOUT = {
    "supertuning": [
        "from peft import PeftModel  # 0.21 or newer", "from transformers import AutoModelForCausalLM", "", _BASE,
        'model = PeftModel.from_pretrained(model, "FOLDER")',
    ],
    "shira": [
        "from peft import PeftModel  # 0.17 or newer", "from transformers import AutoModelForCausalLM", "", _BASE,
        'model = PeftModel.from_pretrained(model, "FOLDER")',
    ],
    "merged": [
        "from transformers import AutoModelForCausalLM", "", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ],
}  # fmt: skip
_READERS = {"supertuning": "import_adapter", "shira": "import_adapter", "safetensors": "load_adapter"}


@dataclass(frozen=True)
class Measured:
    """One number that was measured.

    Attributes:
        value: of it.
        low, high: the ends of its 95 % interval; None where there is none.
        unit: after the numbers, such as ``" %"``.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{interval}{self.unit}"


def share(percent: float, count: int) -> Measured:
    """A share of `count` trials in per cent, with its 95 % interval (Wilson, 1927)."""
    z, p = 1.959964, percent / 100
    if count == 0:
        return Measured(percent, unit=" %")
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Measured(percent, 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0), " %")


def write_card(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: Format,
    *,
    data: str = "",
    measured: Mapping[str, Measured] | None = None,
    licence: str = "",
) -> None:
    """Write the card of what `rigsa.export_adapter` wrote to `folder`.

    Args:
        model: the adapted model.
        folder: where the adapter lies.
        to: its format.
        data: what it was trained on, in words.
        measured: what was measured, by name.
        licence: of the adapter, as model hubs call it (``apache-2.0``); left out where it is empty.

    Raises:
        ValueError: `model` has no gated layer.
        RigsaError: a file cannot be written.
    """
    folder, model = Path(folder), unwrap(model)
    layers = adapted_layers(model)
    patterns = {name: layer.pattern for name, layer in layers.items()}
    base = base_name(model)
    free = sum(pattern.nnz for pattern in patterns.values())
    what = (
        f"A gated sparse adapter (RIGSA, arXiv 2511.01794) of `{base or 'its base model'}`: {free:,} trained entries, "
        f"{density(patterns):.2%} of the weights of {len(layers)} layers"
        + (", merged into its weights." if to == "merged" else ".")
    )
    tags = ["rigsa", "sparse-adapter"]
    lines = _beginning(folder.resolve().name, what, _LIBRARY[to], tags, base, data, measured or {}, licence)
    lines += ["", f"![density of every layer]({FIGURE_FILE})", "", "## Load it", ""]
    lines += _how_to_load(to, base)
    write_text(folder / CARD_FILE, "\n".join(lines) + "\n")

    def draw(temporary: Path) -> None:
        figure = temporary.with_suffix(".png")
        plot_densities({"adapter": patterns}, figure)
        os.replace(figure, temporary)

    write_atomically(folder / FIGURE_FILE, draw)


def write_plain_card(
    folder: Path,
    name: str,
    what: str,
    library: str,
    base: str,
    data: str,
    measured: Mapping[str, Measured],
    licence: str,
) -> None:
    """Write the card of an adapter of another kind.

    Args:
        folder: where it lies.
        name: of what is written.
        what: it is, in words.
        library: that loads it, ``peft`` or ``transformers``.
        base: the base model's name.
        data, measured, licence: as in `write_card`.

    Raises:
        RigsaError: the file cannot be written.
    """
    lines = _beginning(name, f"{what}, of `{base or 'its base model'}`.", library, [], base, data, measured, licence)
    code = _WITHOUT["supertuning" if library == "peft" else "merged"]
    code = [line.partition("  #")[0].format(base=base or "BASE") for line in code]
    write_text(folder / CARD_FILE, "\n".join([*lines, "", "## Load it", "", "```python", *code, "```"]) + "\n")


def _beginning(
    name: str,
    what: str,
    library: str,
    tags: Sequence[str],
    base: str,
    data: str,
    measured: Mapping[str, Measured],
    licence: str,
) -> list[str]:
    """The lines of a card up to the table of what was measured."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        base_model=base or None, library_name=library, license=licence or None,
        tags=[*tags, *(["peft"] if library == "peft" else [])],
    ).to_yaml()  # fmt: skip
    lines = [
        "---", head, "---", "", f"# {name}", "", what, "", f"- Trained on: {data or 'not said'}",
        f"- Licence: {licence or 'not said'}", f"- Written by rigsa {__version__}", "", "## Measured", "",
    ]  # fmt: skip
    if not measured:
        return [*lines, "Nothing was measured."]
    lines += ["| what | value (95 % interval) |", "|---|---|"]
    return lines + [f"| {one} | {found} |" for one, found in measured.items()]


def _how_to_load(to: Format, base: str) -> list[str]:
    lines = []
    if to in _WITHOUT:
        code = [line.format(base=base or "BASE") for line in _WITHOUT[to]]
        lines += ["Without rigsa:", "", "```python", *code, "```", ""]
    if to in _READERS:
        reader = _READERS[to]
        lines += [
            "With rigsa (`pip install rigsa`):", "", "```python", f"from rigsa import {reader}",
            "from transformers import AutoModelForCausalLM", "", _BASE.format(base=base or "BASE"),
            f'{reader}(model, "FOLDER")', "```",
        ]  # fmt: skip
    return lines
