"""Benchmarks as Markdown tables and plots; ``python -m benchmarks.report RESULTS.json FOLDER`` makes them again."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import target_table

Row = Mapping[str, Any]

UNITS = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]


def duration(seconds: float) -> str:
    scale, unit = next((entry for entry in UNITS if seconds >= entry[0]), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "x": ("at", "{:,g}".format),
    "ratio": ("ratio", "{:.2f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "gb_per_second": ("GB/s", "{:.1f}".format),
    "roofline_share": ("of roofline", "{:.0%}".format),
    "saved_bytes": ("saved for backward", size),
    "peak_bytes": ("peak memory", size),
    "extra_bytes": ("extra memory", size),
}


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: providers of one question, with the columns that any of them has."""
    columns = [name for name in COLUMNS if any(name in row["extra_info"] for row in rows)]
    titles = ["provider", "median", "quartiles", *(COLUMNS[name][0] for name in columns)]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        stats, info = row["stats"], row["extra_info"]
        quartiles = f"{duration(stats['q1'])} - {duration(stats['q3'])}"
        cells = (COLUMNS[name][1](info[name]) if name in info else "" for name in columns)
        lines.append([info["provider"], duration(stats["median"]), quartiles, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rows: Sequence[Row]) -> str:
    """All of it: the targets, the exponents, and a table for each question."""
    parts = [("targets", target_table(rows)), ("exponents", exponent_table(rows))]
    parts += [(group, table(members)) for group, members in groups(rows).items()]
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts if text)


# How cost grows


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the power law through the points: the slope of the least-squares line between the logarithms."""
    if len(set(xs)) < 2:
        raise ValueError(f"xs: expected at least two different points, got {list(xs)}")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in log_x)


def curves(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """``{axis: {provider: [(x, median seconds)]}}`` of the rows that lie on an axis."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        info = row["extra_info"]
        if "axis" in info:
            points = found.setdefault(info["axis"], {}).setdefault(info["provider"], [])
            points.append((info["x"], row["stats"]["median"]))
    return {axis: {name: sorted(points) for name, points in lines.items()} for axis, lines in found.items()}


def exponent_table(rows: Iterable[Row]) -> str:
    """Markdown: the fitted exponent of every curve, and that of its last two points."""
    lines = []
    for axis, providers in curves(rows).items():
        for name, points in providers.items():
            if len(points) > 1:
                whole, end = (exponent(*zip(*part, strict=True)) for part in (points, points[-2:]))
                span = f"{points[0][0]:g} - {points[-1][0]:g}"
                lines.append(f"| {axis} | {name} | {span} | {whole:.2f} | {end:.2f} |")
    head = "| axis | provider | from - to | exponent | of the last two points |\n|---|---|---|---:|---:|\n"
    return head + "\n".join(lines) if lines else ""


# Files


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """``tables.md``, ``scale-AXIS.png`` and a plot of ratios for every whole-model question into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    (folder / "tables.md").write_text(tables(rows) + "\n")
    for axis, providers in curves(rows).items():
        _plot_curves(axis, providers, folder / f"scale-{axis}.png")
    for group, members in groups(rows).items():
        if group.startswith(("training step", "generation")):
            _plot_ratios(group, members, folder / f"{re.sub('[^A-Za-z0-9]+', '-', group)}.png")


def _plot_curves(axis: str, providers: Mapping[str, list[tuple[float, float]]], file: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in providers.items():
        xs, ys = zip(*points, strict=True)
        label = f"{name}: exponent {exponent(xs, ys):.2f}" if len(points) > 1 else name
        axes.loglog(xs, ys, marker="o", label=label)
    measured = sorted({x for points in providers.values() for x, _ in points})
    axes.set_xticks(measured, [f"{x:,}" for x in measured])
    axes.xaxis.set_minor_formatter(NullFormatter())  # or labels between powers of ten run into each other
    axes.set(xlabel=axis, ylabel="seconds")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))  # clear of the curves
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _plot_ratios(group: str, rows: Sequence[Row], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 1))
    rows = [row for row in rows if "ratio" in row["extra_info"]]
    infos = [row["extra_info"] for row in rows]
    middle = [info["ratio"] for info in infos]
    low, high = zip(*(info["ratio_quartiles"] for info in infos), strict=True)
    spread = [[a - b for a, b in zip(middle, low, strict=True)], [a - b for a, b in zip(high, middle, strict=True)]]
    axes.barh([info["provider"] for info in infos], middle, xerr=spread)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(title=group, xlabel=f"time beside {infos[0]['floor']}")
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    source, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    write_report(json.loads(source.read_text())["benchmarks"], folder)


if __name__ == "__main__":
    main()
