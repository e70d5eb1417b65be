"""The card beside an adapter that PEFT saves, in the place of PEFT's template with nothing filled in.

A card of somebody's own stays: one without the line `OURS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rigsa.card import CARD_FILE, TAGS, card_text
from rigsa.files import write_text

OURS = "<!-- Written anew whenever the adapter is saved. To keep a card of your own, remove this line. -->"
UNFILLED = "# Model Card for Model ID"
"""A line of the template that PEFT writes."""


def write_peft_card(folder: Path, base: str, layers: dict[str, Any]) -> None:
    """Write the card of the adapter in `folder`, unless somebody has written one.

    Args:
        folder: where the adapter is saved.
        base: name or folder of the base model; empty where it is not known.
        layers: as in `rigsa.RigsaConfig`.

    Raises:
        RigsaError: the card cannot be written.
    """
    path = folder / CARD_FILE
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(library_name="peft"))
    if OURS not in card.text and UNFILLED not in card.text:
        return
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    counts = [(layer["entries"], layer["shape"][0] * layer["shape"][1]) for layer in layers.values()]
    text = card_text(folder.resolve().name, counts, "peft", base=base)
    write_text(path, f"---\n{card.data.to_yaml()}\n---\n\n{OURS}\n\n{text}")
