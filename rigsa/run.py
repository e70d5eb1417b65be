"""The command line: ``python -m rigsa.run imp`` (or ``rigsa imp``)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rigsa.config import PRESETS, Config, check_folder, flag, save
from rigsa.errors import RigsaError

if TYPE_CHECKING:
    from rigsa.experiment import Experiment

METHODS = {
    "imp": "iterative magnitude pruning: train the dense adapter, prune it to tickets, train each",
    "random-mask": "the control: one level whose ticket is drawn at random, as dense as an imp run's last one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error with a message, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except RigsaError as error:
        print(f"rigsa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrigsa: interrupted. Run the same command again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rigsa", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for method, help_text in METHODS.items():
        command = commands.add_parser(
            method, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False
        )
        command.set_defaults(command=run_method, method=method)
        add_run_options(command, method)
    report = commands.add_parser("report", help="redraw tables and figures from run folders", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, drawn together")
    report.add_argument("--out", type=Path, help="folder for report.md and figure.png; default: the first RUN")
    report.set_defaults(command=run_report)
    return parser


def add_run_options(command: argparse.ArgumentParser, method: str) -> None:
    """--preset, --out, --dry-run and one option per field of `Config` that the method reads."""
    command.add_argument(
        "--preset", choices=PRESETS, default="quickstart",
        help="where the other values come from: paper (SmolLM2-1.7B, a 24 GB GPU), quickstart (two CPU cores), "
        "smoke (a check that everything runs); default: quickstart",
    )  # fmt: skip
    command.add_argument("--out", type=Path, help=f"run folder; default: runs/{method}-PRESET-seedSEED")
    command.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    group = command.add_argument_group("configuration (default: the preset's value)")
    for field in dataclasses.fields(Config):
        if field.name == "method" or field.metadata["only"] not in ("", method):
            continue
        group.add_argument(
            f"--{flag(field.name)}",
            dest=field.name,
            type=type(field.default),
            choices=field.metadata["choices"] or None,
            default=argparse.SUPPRESS,
            metavar=None if field.metadata["choices"] else type(field.default).__name__.upper(),
            help=field.metadata["help"].replace("%", "%%"),
        )


def resolve(options: argparse.Namespace) -> Config:
    """The preset with what the command line overrides."""
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    config = dataclasses.replace(PRESETS[options.preset](options.method), **given)
    if config.method == "random-mask":
        if config.match and config.density:
            raise RigsaError("--match and --density: give one of them")
        if not config.match and not config.density:
            config = dataclasses.replace(config, match=str(default_out("imp", options.preset, config.seed)))
    return config


def default_out(method: str, preset: str, seed: int) -> Path:
    return Path("runs") / f"{method}-{preset}-seed{seed}"


def run_method(options: argparse.Namespace) -> None:
    config = resolve(options)
    out = options.out or default_out(config.method, options.preset, config.seed)
    if options.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    quiet_libraries()
    from rigsa.experiment import Experiment
    from rigsa.imp import run_imp
    from rigsa.plan import describe
    from rigsa.random_mask import matched_ticket, run_random_mask
    from rigsa.report import write_report

    if config.method == "random-mask":
        matched_ticket(config)  # say what is missing before a model is loaded
    runners: dict[str, Callable[[Experiment], None]] = {"imp": run_imp, "random-mask": run_random_mask}
    check_folder(config, out)
    experiment = Experiment.prepare(config, out)
    print(describe(experiment), flush=True)
    save(config, out)
    runners[config.method](experiment)
    table, figure = write_report([out], out)
    print(f"\n{table}\n\nfigure: {figure}")


def run_report(options: argparse.Namespace) -> None:
    from rigsa.report import write_report

    table, figure = write_report(options.runs, options.out or options.runs[0])
    print(f"{table}\n\nfigure: {figure}")


def quiet_libraries() -> None:
    """Keep what other libraries say on every start out of our output; errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch.utils.data")


if __name__ == "__main__":
    sys.exit(main())
