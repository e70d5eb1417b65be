"""Training losses of runs side by side: ``python benchmarks/loss_curves.py RUN... --out docs/loss_curves.png``.

Every RUN is a run folder; what is drawn is the log of its level 0, and its label is what sets its configuration apart.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import flag
from rigsa.experiments.run_folder import CONFIG_FILE, LOG_FILE, level_folder
from rigsa.files import read_json, write_atomically

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
"""Okabe & Ito (2008): told apart with any colour vision."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
MARKERS = "osD^vPX"
BESIDE = ("prunings", "drift", "source_tasks", "data_dir", "limit")
"""Fields on which the training of level 0 does not depend."""
MARKS = 8
"""Markers on a curve: curves that lie on each other can then still be counted."""


SUFFIXES = (".png", ".pdf", ".svg")


def styles() -> Iterator[dict[str, Any]]:
    """Colour, dashes and marker of one curve after another; each alone tells seven apart, so print needs no colour."""
    for colour, dash, marker in cycle(zip(COLOURS, DASHES, MARKERS, strict=True)):
        yield {"color": colour, "linestyle": dash, "marker": marker}


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """``(steps, losses)``, each loss the mean since the line before.

    Raises:
        RigsaError: the run has no log of level 0, or an empty one.
    """
    log = level_folder(run, 0) / LOG_FILE
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if not lines:
        raise RigsaError(f"RUN {run}: expected a run whose level 0 is trained, found no lines in {log}")
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One for each run: the fields in which it differs from the first, which is the reference.

    The first one's label has the fields in which any of the others differs from it. Those in `BESIDE` make no
    difference. Runs without one are numbered.
    """
    fields = dict.fromkeys(name for config in configs for name in config if name not in BESIDE)
    names = [name for name in fields if _differ(configs, name)]
    own = [names, *([name for name in names if config.get(name) != configs[0].get(name)] for config in configs[1:])]
    texts = [_fields(some, config) for some, config in zip(own, configs, strict=True)]
    return [text or f"run {number}" for number, text in enumerate(texts, start=1)]


def _differ(configs: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(config.get(name) != configs[0].get(name) for config in configs)


def _fields(names: Sequence[str], config: Mapping[str, Any]) -> str:
    return ", ".join(f"{flag(name)} {config.get(name)}" for name in names)


def draw(runs: Sequence[Path], file: Path) -> None:
    """One figure. Raises RigsaError where a folder is no run, or a file's name has no known ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    if file.suffix not in SUFFIXES:
        raise RigsaError(f"--out {file}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    for run in runs:
        if not (run / CONFIG_FILE).is_file():
            raise RigsaError(f"RUN {run}: expected a run folder, found no {CONFIG_FILE} in it")
    curves = [read_losses(run) for run in runs]
    names = labels([read_json(run / CONFIG_FILE) for run in runs])
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, ((steps, losses), name, style) in enumerate(zip(curves, names, styles(), strict=False)):
        every = math.ceil(len(steps) / MARKS)
        start = number * every // max(len(runs), 1)  # curves that lie on each other are marked at different steps
        axes.plot(steps, losses, label=name, linewidth=1.4, markersize=5, markevery=(start, every), **style)
    axes.set(xlabel="optimiser step", ylabel="training loss (nats, mean since the point before)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small", handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    kind = file.suffix.removeprefix(".")
    write_atomically(file, lambda temporary: figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight"))
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"the figure: {', '.join(SUFFIXES)}")
    options = parser.parse_args(arguments)
    try:
        draw(options.runs, options.out)
    except RigsaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
