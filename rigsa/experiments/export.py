"""The adapter of a finished level for others: ``rigsa export RUN --to supertuning`` (`rigsa.export`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rigsa.card import Measured, share, write_card
from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.measures import HELD_OUT, accuracies, title, unit
from rigsa.experiments.records import metrics_of, read_record
from rigsa.experiments.run_folder import METRICS_FILE, finished_level
from rigsa.export import Format, export_adapter, refuse_to_overwrite, write_merged

EXPORTS = "export"
"""The folder in a run folder that holds its exports, each under the name of its format."""


def export_run(run: Path, to: Format, out: Path | None = None, level: int | None = None, licence: str = "") -> Path:
    """Write the adapter of a run in another format, and its model card; see `rigsa.export` and `rigsa.card`.

    Args:
        run: folder of a run with gated layers.
        to: the format.
        out: the folder to write; by default one in the run folder. That of a merged model must not be there yet.
        level: of the adapter; the last finished one by default.
        licence: of the adapter, for the card.

    Returns:
        The folder.

    Raises:
        RigsaError: there is no such run or level, its model cannot be loaded, its method trains an adapter of PEFT, or
            the format has no room for the adapter.
    """
    config, level = load(run), finished_level(run, level)
    if config.method.peft or not config.method.gated:
        raise RigsaError(f"{run}: expected a run of a method with gated layers alone, got {config.method}")
    folder = run / EXPORTS / to if out is None else out
    if to == "merged":
        refuse_to_overwrite(folder)  # before a model is loaded
    experiment = Experiment.prepare(config, run)
    experiment.attach()
    experiment.restore(level)
    if to == "merged":
        try:
            write_merged(experiment.model.eval(), folder, tokenizer=experiment.task.conversation.tokenizer)
        except RigsaError as error:
            raise RigsaError(f"{error} (rigsa merge {run} has --dtype and --dequantize)") from error
    else:
        export_adapter(experiment.model.eval(), folder, to)
    metrics = read_record(experiment.folder(level) / METRICS_FILE, metrics_of(config))
    number = f"{experiment.task.num_training:,} {unit(config)}"
    source = number if config.is_text else f"{config.data}, {number}"  # the title of texts is the name of their file
    data = f"{title(config)} ({source}), rigsa {config.method}, level {level}"
    write_card(experiment.model, folder, to, data=data, measured=_measured(config, metrics), licence=licence)
    return folder


def _measured(config: Config, metrics: dict[str, Any]) -> dict[str, Measured]:
    found = {}
    for measure in accuracies(config):
        tested = metrics["test"][measure.keys[1]]
        trials = 0 if config.is_text and measure.keys[1] == HELD_OUT else tested["examples"]  # tokens are no trials
        name = measure.name if config.is_text else f"accuracy on test images, {measure.name}"
        found[name] = share(tested["accuracy"], trials)
    if "drift" in metrics:
        kl, error = metrics["drift"]["kl"], 1.959964 * metrics["drift"]["stderr"]
        found["drift from the base's own replies"] = Measured(kl, kl - error, kl + error, " nats a token")
    return found
