"""The adapter of a finished level for others: ``rigsa export RUN --to supertuning`` (`rigsa.export`).

A run of one of PEFT's own methods has the format of that name, ``lora`` or ``shira``, and a merged model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

from rigsa.card import Measured, share, write_card
from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.export_peft import write_merged_peft, write_peft
from rigsa.experiments.measures import HELD_OUT, accuracies, title, unit
from rigsa.experiments.records import metrics_of, read_record
from rigsa.experiments.run_folder import METRICS_FILE, finished_level
from rigsa.export import Format, export_adapter, refuse_to_overwrite, write_merged

EXPORTS = "export"
"""The folder in a run folder that holds its exports, each under the name of its format."""


def formats_of(config: Config) -> tuple[str, ...]:
    """The formats that the adapter of a run can be exported to."""
    if not config.method.peft:
        return get_args(Format)
    whole = ("merged",) if config.quantize == "none" else ()  # four bits have no room for a difference
    return whole if config.method.gated else (config.method.peft, *whole)


def export_run(run: Path, to: str, out: Path | None = None, level: int | None = None, licence: str = "") -> Path:
    """Write the adapter of a run in another format, and its model card; see `rigsa.export` and `rigsa.card`.

    Args:
        run: folder of a run.
        to: the format, one of `formats_of`.
        out: the folder to write; by default one in the run folder. That of a merged model, or of an adapter of PEFT's
            own methods, must not be there yet.
        level: of the adapter; the last finished one by default.
        licence: of the adapter, for the card.

    Returns:
        The folder.

    Raises:
        RigsaError: there is no such run or level, its model cannot be loaded, its method has no such format, or the
            format has no room for the adapter.
    """
    config, level = load(run), finished_level(run, level)
    if to not in formats_of(config):
        bits = " on a base in four bits" if config.quantize != "none" else ""
        expected = " or ".join(formats_of(config)) or "none, as no format holds two adapters"
        raise RigsaError(f"--to: expected {expected} for a run of {config.method}{bits}, got {to}")
    folder = run / EXPORTS / to if out is None else out
    if to == "merged" or not config.method.gated:
        refuse_to_overwrite(folder)  # before a model is loaded
    experiment = Experiment.prepare(config, run)
    experiment.attach()
    experiment.restore(level)
    model, tokenizer = experiment.model.eval(), experiment.task.conversation.tokenizer
    said = _said(experiment, level) | {"licence": licence}
    if not config.method.gated:
        if to == "merged":
            write_merged_peft(model, folder, tokenizer, **said)
        else:
            write_peft(model, folder, **said)
        return folder
    if to == "merged":
        try:
            write_merged(model, folder, tokenizer=tokenizer)
        except RigsaError as error:
            raise RigsaError(f"{error} (rigsa merge {run} has --dtype and --dequantize)") from error
    else:
        export_adapter(model, folder, cast(Format, to))
    write_card(model, folder, cast(Format, to), **said)
    return folder


def _said(experiment: Experiment, level: int) -> dict[str, Any]:
    """What a card says of a level: the data, and what was measured."""
    config = experiment.config
    metrics = read_record(experiment.folder(level) / METRICS_FILE, metrics_of(config))
    number = f"{experiment.task.num_training:,} {unit(config)}"
    source = number if config.is_text else f"{config.data}, {number}"  # the title of texts is the name of their file
    data = f"{title(config)} ({source}), rigsa {config.method}, level {level}"
    return {"data": data, "measured": _measured(config, metrics)}


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
