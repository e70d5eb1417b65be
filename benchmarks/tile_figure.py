"""Density, tile and time in one figure: training steps of two layers, as shares of a frozen layer's passes.

    python -m benchmarks.tile_figure --out docs/benchmarks/tiles.png

The layers are those of SmolLM2-135M's feed-forward block, 1536 x 576 and 576 x 1536, with 1,424 tokens. A step is
forward, backward and the optimiser's update; the frozen layer makes its output and the gradient of its input. All take
turns, round by round, and what is drawn is the median over the rounds of the ratio within a round. Time is processor
time of one thread, which waits for nobody.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.checks import make_problem
from benchmarks.loss_curves import styles
from benchmarks.providers import TICKET, build_ours, build_plain
from rigsa.files import write_atomically
from rigsa_kernels import MaskedAdamW

CPU = torch.device("cpu")
SHAPES = ((1536, 576), (576, 1536))
TOKENS = 1424
DENSITIES = (0.01, TICKET, 0.1, 0.25, 0.5)
TILES = ("entries", "16", "32", "64", "columns", "rows")
FROZEN, FULL = "frozen", "full fine-tuning"
Key = tuple[str, float]
"""A tile, or what is beside the tiles, and a density."""


class Step:
    """One layer, its input and its optimiser."""

    def __init__(self, module: nn.Module, x: torch.Tensor, dy: torch.Tensor, optimizer: torch.optim.Optimizer | None):
        self.module, self.dy, self.optimizer = module, dy, optimizer
        self.x = x.clone().requires_grad_()

    def __call__(self) -> None:
        self.module(self.x).backward(self.dy)
        self.x.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def steps_of(dtype: torch.dtype) -> dict[Key, list[Step]]:
    """By contestant, a step of each layer."""
    found: dict[Key, list[Step]] = {(FROZEN, 0.0): [], (FULL, 1.0): []}
    found |= {(tile, density): [] for tile in TILES for density in DENSITIES}
    for shape in SHAPES:
        problem = make_problem(TOKENS, shape, dtype, CPU)
        make = partial(Step, x=problem.x, dy=problem.dy)
        frozen, full = build_plain(problem, 1.0).module.requires_grad_(False), build_plain(problem, 1.0).module
        found[FROZEN, 0.0].append(make(frozen, optimizer=None))
        found[FULL, 1.0].append(make(full, optimizer=torch.optim.AdamW(full.parameters(), fused=True)))
        for tile in TILES:
            for density in DENSITIES:
                chosen = None if tile == "entries" else tile
                module = build_ours(problem, density, tile=chosen, numerics="composed").module
                optimizer = MaskedAdamW([{"params": [module.rigsa_values, module.rigsa_alpha]}])
                found[tile, density].append(make(module, optimizer=optimizer))
    return found


def seconds(steps: list[Step]) -> float:
    begin = time.process_time()
    for step in steps:
        step()
    return time.process_time() - begin


def race(dtype: torch.dtype, rounds: int) -> dict[Key, float]:
    """By contestant, the median over the rounds of its time as a share of the frozen layers'."""
    contestants = steps_of(dtype)
    for steps in contestants.values():
        seconds(steps)  # makes what is kept from step to step
    taken = [{key: seconds(steps) for key, steps in contestants.items()} for _ in range(rounds)]
    return {key: statistics.median(times[key] / times[FROZEN, 0.0] for times in taken) for key in contestants}


def table(ratios: Mapping[Key, float]) -> str:
    lines = [f"| tile | {' | '.join(f'{density:.3g}' for density in DENSITIES)} |"]
    lines.append("|---" + "|---:" * len(DENSITIES) + "|")
    for tile in TILES:
        lines.append(f"| {tile} | {' | '.join(f'{ratios[tile, density]:.2f}' for density in DENSITIES)} |")
    return "\n".join([*lines, f"full fine-tuning: {ratios[FULL, 1.0]:.2f}"])


def draw(found: Mapping[str, Mapping[Key, float]], file: Path) -> None:
    """A panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 4), sharey=True, squeeze=False)
    for axes, (dtype, ratios) in zip(panels[0], found.items(), strict=True):
        for tile, style in zip(TILES, styles(), strict=False):
            label = tile if tile in ("entries", "rows", "columns") else f"tiles of {tile}"
            axes.plot(DENSITIES, [ratios[tile, density] for density in DENSITIES], label=label, **style)
        axes.axhline(ratios[FULL, 1.0], color="black", linewidth=0.8)
        axes.annotate("full fine-tuning", (DENSITIES[0], ratios[FULL, 1.0]), fontsize="small", va="bottom")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="density", title=dtype)
        axes.set_xticks(DENSITIES, [f"{density:.3g}" for density in DENSITIES], minor=False)
        axes.minorticks_off()
        axes.grid(True, alpha=0.25)
    panels[0][0].set_ylabel("time of a step / frozen layer's passes")
    panels[0][-1].legend(fontsize="small", handlelength=4)
    kind = file.suffix.removeprefix(".")
    write_atomically(file, lambda temporary: figure.savefig(temporary, format=kind, dpi=150, bbox_inches="tight"))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_figure", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the figure: .png, .pdf or .svg")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"argument --out: expected a name that ends in .png, .pdf or .svg, got {options.out}")
    torch.set_num_threads(1)
    found = {dtype: race(getattr(torch, dtype), options.rounds) for dtype in options.dtypes}
    for dtype, ratios in found.items():
        print(f"\n{dtype}, as shares of the frozen layers' passes\n\n{table(ratios)}")
    draw(found, options.out)


if __name__ == "__main__":
    main()
