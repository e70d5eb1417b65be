"""The command line. ``python -m benchmarks.gpu_proof --help``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_proof.promises import write_summary
from benchmarks.gpu_proof.runner import run_stages
from benchmarks.gpu_proof.schedule import DRY_PATIENCE, PART_LIMIT, WHOLE_LIMIT, stages
from benchmarks.gpu_proof.setting import Setting


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument("--part", type=int, choices=(1, 2), help="one half, of four and a half minutes at most")
    parser.add_argument("--sections", metavar="A,B", help="these alone")
    parser.add_argument("--data", default="", metavar="FOLDER", help="MNIST's IDX files, for the section mnist")
    parser.add_argument("--runs", default="", metavar="FOLDER", help="keep the run of mnist there, and go on with it")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: proves that the command itself runs")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --dry runs all of it at tiny sizes on a CPU")
    try:
        options.stages = stages(options.part, options.sections.split(",") if options.sections else None)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # sections end with the command
    options.out.mkdir(parents=True, exist_ok=True)
    limit = (WHOLE_LIMIT if options.part is None else PART_LIMIT) * (DRY_PATIENCE if options.dry else 1)
    setting = Setting(options.out.resolve(), options.dry, time.monotonic() + limit, options.data, options.runs)
    run_stages(options.stages, setting, lambda line: print(line, flush=True))
    print(write_summary(setting.out, dry=options.dry))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
