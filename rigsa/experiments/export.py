"""The adapter of a finished level for others: ``rigsa export RUN --to supertuning`` (`rigsa.export`)."""

from __future__ import annotations

from pathlib import Path

from rigsa.errors import RigsaError
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.run_folder import finished_level
from rigsa.export import Format, export_adapter

EXPORTS = "export"
"""The folder in a run folder that holds its exports, each under the name of its format."""


def export_run(run: Path, to: Format, out: Path | None = None, level: int | None = None) -> Path:
    """Write the adapter of a run in another format; see `rigsa.export`.

    Args:
        run: folder of a run with gated layers.
        to: the format.
        out: the folder to write; by default one in the run folder.
        level: of the adapter; the last finished one by default.

    Returns:
        The folder.

    Raises:
        RigsaError: there is no such run or level, its model cannot be loaded, its method trains an adapter of PEFT, or
            the format has no room for the adapter.
    """
    config, level = load(run), finished_level(run, level)
    if config.method.peft or not config.method.gated:
        raise RigsaError(f"{run}: expected a run of a method with gated layers alone, got {config.method}")
    experiment = Experiment.prepare(config, run)
    experiment.attach()
    experiment.restore(level)
    folder = run / EXPORTS / to if out is None else out
    export_adapter(experiment.model.eval(), folder, to)
    if to == "merged":
        experiment.task.conversation.tokenizer.save_pretrained(folder)
    return folder
