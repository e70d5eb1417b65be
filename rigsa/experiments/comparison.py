"""Several methods on one's own data with one budget: a sweep, and a table that says which to take.

::

    python -m rigsa.run compare --data chats.jsonl --methods imp,lora,sift --seeds 0,1,2 --out runs/compare

With ``--equal steps`` (the default) every level of every method makes as many steps of as many examples. With
``--equal parameters`` the last ticket of each method besides has as many entries as LoRA of the given rank trains
numbers. Full fine-tuning and dense levels stay dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import PRESETS, configured
from rigsa.experiments.report.decision import decision_table
from rigsa.experiments.report.runs import read_report
from rigsa.files import write_text

BUDGETS = ("steps", "parameters")
DECISION_FILE = "compare.md"
_STEPS = ("epochs", "max_steps", "batch_size")


def equal_budget(methods: Sequence[str], preset: str, given: dict[str, Any], equal: str) -> dict[str, Any]:
    """The options that give each method the same budget; what was given stays.

    Args:
        methods: names, the first of which sets the steps that are not given.
        preset: where other values come from.
        given: fields of `Config` from the command line.
        equal: ``steps`` or ``parameters``.

    Raises:
        RigsaError: the model's configuration cannot be loaded, or the size of tickets is given twice.
    """
    if equal == "parameters" and given.get("keep_fraction"):
        raise RigsaError(
            "--keep-fraction and --equal parameters: both say how many entries a ticket has; give one of them"
        )
    usual = PRESETS[preset](methods[0], given.get("device", "auto"))
    options = {name: getattr(usual, name) for name in _STEPS} | given
    if equal == "steps":
        return options
    share = low_rank_share(preset, options)
    read = {name for method in methods for name in METHODS[method].options}
    tickets = {"density": share}
    return options | {name: value for name, value in tickets.items() if name in read and name not in given}


def low_rank_share(preset: str, options: dict[str, Any]) -> float:
    """The numbers that LoRA trains as a share of the adapted weights."""
    import torch

    from rigsa.experiments.memory.simulate import SimulatedModel
    from rigsa.experiments.model import model_shape

    own = {name: value for name, value in options.items() if METHODS["lora"].reads(name)}
    config = configured(preset, "lora", own)
    share = SimulatedModel(model_shape(config.model), config, torch.device("cpu"), 1.0).trained_share()
    return round(share, 6)


def decide(runs: Sequence[Path], out: Path) -> str:
    """Write the table and the verdict into `out`, and return them as text."""
    table, sentence = decision_table(read_report(runs))
    text = f"{table.markdown()}\n\n{sentence}"
    write_text(out / DECISION_FILE, f"# {table.title}\n\n{text}\n\n{table.note}\n")
    return text
