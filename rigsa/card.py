"""The model card of an adapter: what it is, what was measured, how to load it with this package and without.

A card is ``README.md`` beside the files, as model hubs show it, and ``densities.png``: the density of every layer. An
adapter that PEFT saves has a card without figure and measurements (`rigsa.peft_tuner.config`), which `write_card`
replaces.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn as nn

from rigsa.base import base_name
from rigsa.export import Format
from rigsa.files import write_atomically, write_text
from rigsa.inspection import plot_densities
from rigsa.state import adapted_layers, unwrap
from rigsa_kernels import __version__

CARD_FILE, FIGURE_FILE = "README.md", "densities.png"
Kind = Literal[Format, "peft"]
"""What a card stands beside: a format of `rigsa.export_adapter`, or what PEFT's ``save_pretrained`` writes."""
_LIBRARY = {"supertuning": "peft", "shira": "peft", "safetensors": "rigsa", "merged": "transformers", "peft": "peft"}
TAGS = ["rigsa", "sparse-adapter"]
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
_WITH = {
    reader: [
        f"from rigsa import {reader}", "from transformers import AutoModelForCausalLM", "", _BASE,
        f'{reader}(model, "FOLDER")',
    ]
    for reader in ("import_adapter", "load_adapter")
} | {
    "peft": [
        "import rigsa  # has PEFT know the method", "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM", "", _BASE,
        'model = PeftModel.from_pretrained(model, "FOLDER")',
    ]
}  # fmt: skip
_READERS = {
    "supertuning": "import_adapter", "shira": "import_adapter", "safetensors": "load_adapter", "peft": "peft",
}  # fmt: skip


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
    to: Kind,
    *,
    data: str = "",
    measured: Mapping[str, Measured] | None = None,
    licence: str = "",
) -> None:
    """Write the card of what `rigsa.export_adapter`, or ``save_pretrained`` of a model of PEFT, wrote to `folder`.

    Args:
        model: the adapted model.
        folder: where the adapter lies.
        to: its format; ``"peft"`` for what PEFT saved.
        data: what it was trained on, in words.
        measured: what was measured, by name.
        licence: of the adapter, as model hubs call it (``apache-2.0``); left out where it is empty.

    Raises:
        ValueError: `model` has no gated layer.
        RigsaError: a file cannot be written.
    """
    from huggingface_hub import ModelCardData

    folder, model = Path(folder), unwrap(model)
    layers = adapted_layers(model)
    patterns = {name: layer.pattern for name, layer in layers.items()}
    base = base_name(model)
    head = ModelCardData(
        base_model=base or None, library_name=_LIBRARY[to], license=licence or None,
        tags=[*TAGS, *(["peft"] if _LIBRARY[to] == "peft" else [])],
    ).to_yaml()  # fmt: skip
    counts = [(pattern.nnz, math.prod(pattern.shape)) for pattern in patterns.values()]
    text = card_text(
        folder.resolve().name, counts, to, base=base, data=data, measured=measured, licence=licence, figure=True
    )
    write_text(folder / CARD_FILE, f"---\n{head}\n---\n\n{text}")

    def draw(temporary: Path) -> None:
        figure = temporary.with_suffix(".png")
        plot_densities({"adapter": patterns}, figure)
        os.replace(figure, temporary)

    write_atomically(folder / FIGURE_FILE, draw)


def card_text(
    title: str,
    counts: Sequence[tuple[int, int]],
    to: Kind,
    *,
    base: str,
    data: str = "",
    measured: Mapping[str, Measured] | None = None,
    licence: str = "",
    figure: bool = False,
) -> str:
    """The card below its head.

    Args:
        title: the adapter's name.
        counts: free entries and weights of each layer.
        to, data, measured, licence: as in `write_card`.
        base: name or folder of the base model; empty where it is not known.
        figure: whether `FIGURE_FILE` lies beside the card.
    """
    free, weights = sum(count for count, _ in counts), sum(count for _, count in counts)
    what = (
        f"A gated sparse adapter (RIGSA, arXiv 2511.01794) of `{base or 'its base model'}`: {free:,} trained entries, "
        f"{free / max(weights, 1):.2%} of the weights of {len(counts)} layers"
        + (", merged into its weights." if to == "merged" else ".")
    )
    lines = _beginning(title, what, data, measured or {}, licence)
    if figure:
        lines += ["", f"![density of every layer]({FIGURE_FILE})"]
    return "\n".join([*lines, "", "## Load it", "", *_how_to_load(to, base)]) + "\n"


def _beginning(title: str, what: str, data: str, measured: Mapping[str, Measured], licence: str) -> list[str]:
    """The lines of a card up to the table of what was measured. `what` says what lies beside it."""
    lines = [
        f"# {title}", "", what, "", f"- Trained on: {data or 'not said'}", f"- Licence: {licence or 'not said'}",
        f"- Written by rigsa {__version__}", "", "## Measured", "",
    ]  # fmt: skip
    if not measured:
        return [*lines, "Nothing was measured."]
    lines += ["| what | value (95 % interval) |", "|---|---|"]
    return lines + [f"| {name} | {found} |" for name, found in measured.items()]


def write_plain_card(
    folder: Path,
    title: str,
    what: str,
    library: Literal["peft", "transformers"],
    *,
    base: str,
    data: str,
    measured: Mapping[str, Measured],
    licence: str,
) -> None:
    """Write the card of an adapter without gates.

    Args:
        folder: where it lies.
        title: its name.
        what: it is, in words.
        library: that loads it.
        base: the base model's name; empty where it is not known.
        data, measured, licence: as in `write_card`.

    Raises:
        RigsaError: the file cannot be written.
    """
    from huggingface_hub import ModelCardData

    tags = ["peft"] if library == "peft" else None
    head = ModelCardData(
        base_model=base or None, library_name=library, license=licence or None, tags=tags
    ).to_yaml()  # fmt: skip
    lines = _beginning(title, f"{what}, of `{base or 'its base model'}`.", data, measured, licence)
    code = _WITHOUT["supertuning" if library == "peft" else "merged"]
    code = [line.partition("  #")[0].format(base=base or "BASE") for line in code]
    text = "\n".join([*lines, "", "## Load it", "", "```python", *code, "```"])
    write_text(folder / CARD_FILE, f"---\n{head}\n---\n\n{text}\n")


def _how_to_load(to: Kind, base: str) -> list[str]:
    lines = []
    if to in _WITHOUT:
        code = [line.format(base=base or "BASE") for line in _WITHOUT[to]]
        lines += ["Without rigsa:", "", "```python", *code, "```", ""]
    if to in _READERS:
        code = [line.format(base=base or "BASE") for line in _WITH[_READERS[to]]]
        lines += ["With rigsa (`pip install rigsa`):", "", "```python", *code, "```"]
    if to == "peft":
        lines += ["", "Without rigsa: not in this format; `rigsa.export_adapter` writes others and a merged model."]
    return lines
