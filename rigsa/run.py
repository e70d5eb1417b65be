"""The command line: ``python -m rigsa.run imp`` (or ``rigsa imp``)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

_interrupts: list[int] = []
"""Signals that came. C code that is importing a module may swallow the exception, and fail in another way later."""


def note_interrupt(number: int, _frame: object) -> None:
    """What Python does at Ctrl-C, and a note of it."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def say_nothing_of_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
    """Python reports what a destructor or a callback of C swallowed; an interrupt is noted already."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and __name__ == "__main__":
    signal.signal(signal.SIGINT, note_interrupt)
    sys.unraisablehook = say_nothing_of_interrupts

try:  # PyTorch takes a second to import: Ctrl-C is one line then, too
    import torch

    from rigsa.errors import RigsaError
    from rigsa.experiments import bounds
    from rigsa.experiments.bounds import GIBIBYTES, SHARE, Choice, Number, Range
    from rigsa.experiments.config import OPTIONS, Config, Measuring, Method, fields_of, flag, require
    from rigsa.experiments.config_file import check_folder, load, save
    from rigsa.experiments.methods.registry import METHODS
    from rigsa.experiments.presets import PRESETS, configured
    from rigsa.export import Format
    from rigsa.files import reason_of, remove_temporaries, write_json
except BaseException as error:
    if not _interrupts and not isinstance(error, KeyboardInterrupt):
        raise
    print("\nrigsa: interrupted.", file=sys.stderr)
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment
    from rigsa.experiments.memory.plan import LevelPlan, Target
    from rigsa.experiments.tasks.task import Size, Task

SWEEP = "methods x seeds x settings: run folders one after another, on one machine or in shards, and their report"
COMPARE = "several methods on your own data with one budget, and a table that says which to take"
REPORT = "tables and figures from run folders alone"
CHAT = "talk to the adapted model of a run, and show it its test examples"
EXPORT = "the trained adapter of a run for those who do not have this package, or a merged model"
MERGE = "write the plain model that a run or a saved adapter makes of its base, for anything that loads such models"
INSPECT = "densities by layer of adapters and runs, and what each two share: a table and a figure"
MEASURE = "test the levels of a finished run again, with other tests; nothing is trained"
PLAN = "say before training what fits: simulates every level's step for a GPU (or --device cpu), without one"
TOKENS = {"digits": 93}
"""Data to the tokens of a prompt without examples, by SmolLM2's tokenizer. Images of 28x28 have `MNIST_TOKENS`."""
MNIST_TOKENS = 860


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error with a message, 130 after Ctrl-C."""
    resumes = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold half a character
    try:
        try:
            options = parse(arguments)
            resumes = options.command in (run_method, run_sweep, run_compare, run_measure)
            options.command(options)
        finally:
            flush_output()  # here, where it is one line if that fails, and not as Python ends
    except (Exception, KeyboardInterrupt) as error:
        if _interrupts or isinstance(error, KeyboardInterrupt):
            hint = " Run the same command again to go on from the last checkpoint." if resumes else ""
            say(f"\n{speaker()}: interrupted.{hint}")
            return 130
        if isinstance(error, RigsaError):
            return fail(str(error))
        if isinstance(error, OSError):  # no one's argument: what the system refused on the way
            named = f"{error.filename}: " if error.filename else "input or output failed: "
            return fail(f"{named}{reason_of(error)}")
        raise
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for; exits after ``--help``. Raises RigsaError for what is none of its options."""
    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument.startswith("--") and argument.endswith("=--"):  # argparse would drop the value, and fail on that
            raise RigsaError(f"{argument[:-3]}: expected a value, got '--'")
    options, rest = build_parser().parse_known_args(arguments)
    if options.command in (run_method, run_plan):  # a plan has the options of all methods
        given = [f"--{flag(name)}" for name in given_fields(options)]
        for argument in (*given, *rest):
            _refuse_of_others(argument.partition("=")[0], options.method)
    if rest:
        options.parser.refuse(rest)
    return options


def _refuse_of_others(option: str, method: str) -> None:
    """Raises RigsaError where `option` is one that other methods read, and `method` does not."""
    readers = [other for other, its in METHODS.items() if option in {f"--{flag(field)}" for field in its.options}]
    if readers and method not in readers:
        raise RigsaError(f"{option}: {method} does not read it; it is for {', '.join(readers)}")


def flush_output() -> None:
    """Write what standard output holds.

    Raises:
        OSError: nobody reads it any more, or its device is full. Nothing more is tried to be written there.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # or Python tries once more as it ends, with a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def fail(message: str) -> int:
    say(f"{speaker()}: {message}")
    return 1


def say(text: str) -> None:
    """To standard error, if that takes it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def speaker() -> str:
    """The name that messages begin with. It tells processes apart if a launcher started several."""
    rank = os.environ.get("RANK", "0")
    return "rigsa" if rank == "0" else f"rigsa (process {rank})"


class Parser(argparse.ArgumentParser):
    """One whose errors are one sentence, without the usage, which has a hundred options."""

    def error(self, message: str) -> NoReturn:
        """Raises RigsaError."""
        raise RigsaError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Raises RigsaError for arguments that are none of this command's, with the option that the first may mean."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1, cutoff=0.8)
        hint = f" (did you mean {close[0]}?)" if close else ""
        self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")


def sentence(help: str) -> str:
    """A line of the list of commands as a sentence. The rest of it is left as it is, for it names people."""
    return f"{help[0].upper()}{help[1:]}."


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rigsa", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for method in METHODS.values():
        command = commands.add_parser(
            method.name, help=method.help, description=sentence(method.help), allow_abbrev=False
        )
        command.set_defaults(command=run_method, method=method.name)
        add_run_options(command, method)
    add_plan(commands.add_parser("plan", help=PLAN, description=sentence(PLAN), allow_abbrev=False))
    add_sweep(commands.add_parser("sweep", help=SWEEP, description=sentence(SWEEP), allow_abbrev=False))
    compare = commands.add_parser("compare", help=COMPARE, description=sentence(COMPARE), allow_abbrev=False)
    add_compare(compare)
    report = commands.add_parser("report", help=REPORT, description=sentence(REPORT), allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=utf8_path, metavar="RUN", help="run folders, or folders that hold them")
    report.add_argument(
        "--out",
        type=utf8_path,
        help="folder for report.html, report.md, report.csv and figures; default: RUN, or ./report",
    )
    report.set_defaults(command=run_report)
    measure = commands.add_parser("measure", help=MEASURE, description=sentence(MEASURE), allow_abbrev=False)
    measure.add_argument("run", type=utf8_path, metavar="RUN", help="run folder")
    add_configuration(measure, lambda name: name in fields_of(Measuring), "as the run was measured")
    measure.set_defaults(command=run_measure)
    chat = commands.add_parser("chat", help=CHAT, description=sentence(CHAT), allow_abbrev=False)
    chat.add_argument("run", type=utf8_path, metavar="RUN", help="run folder")
    add_number(chat, "--level", int, bounds.COUNT_OR_0, help="of the adapter; default: the last finished one")
    add_number(chat, "--max-new-tokens", int, bounds.TOKENS, default=256, help="where a reply is cut; default: 256")
    chat.set_defaults(command=run_chat)
    add_export(commands.add_parser("export", help=EXPORT, description=sentence(EXPORT), allow_abbrev=False))
    add_merge(commands.add_parser("merge", help=MERGE, description=sentence(MERGE), allow_abbrev=False))
    inspect = commands.add_parser("inspect", help=INSPECT, description=sentence(INSPECT), allow_abbrev=False)
    inspect.add_argument(
        "sources", nargs="+", type=utf8_path, metavar="ADAPTER",
        help="folders of saved adapters, run folders (all their finished levels), or folders of levels",
    )  # fmt: skip
    inspect.add_argument(
        "--out", type=utf8_path, default=Path("tickets.png"), metavar="FILE", help="of the figure; default: tickets.png"
    )
    inspect.set_defaults(command=run_inspect)
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # whose help an error names
    return parser


def add_merge(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run_merge)
    command.add_argument("source", type=utf8_path, metavar="RUN", help="run folder, or folder of a saved adapter")
    command.add_argument("--out", type=utf8_path, required=True, metavar="FOLDER", help="must not be there yet")
    add_number(command, "--level", int, bounds.COUNT_OR_0, help="of a run; default: the last finished one")
    command.add_argument("--base", help="of a saved adapter: hub id or folder; default: the one that it names")
    add_choice(
        command, "--dtype", ("float32", "bfloat16", "float16"), help="of the merged weights; default: the base's"
    )
    command.add_argument(
        "--dequantize", action="store_true", help="merge a base in four bits into one in the dtype it computes in"
    )


def add_run_options(command: argparse.ArgumentParser, method: Method) -> None:
    """--preset, --out, --dry-run and one option per field of `Config` that the method reads."""
    add_preset(command, "quickstart")
    command.add_argument("--out", type=utf8_path, help=f"run folder; default: runs/{method}-PRESET-seedSEED")
    command.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    add_number(
        command, "--gpu-memory", float, GIBIBYTES, metavar="GIB",
        help="refuse a run that is planned to need more; default: what the GPU has, and no limit on a CPU",
    )  # fmt: skip
    add_configuration(command, method.reads)


def add_plan(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run_plan)
    add_preset(command, "paper")
    planned = [method for method in METHODS.values() if method.planned]
    add_choice(command, "--method", [method.name for method in planned], default="imp", help="default: imp")
    add_number(command, "--gpu-memory", float, GIBIBYTES, default=24.0, metavar="GIB", help="of the GPU; default: 24")
    add_number(
        command, "--tokens", int, bounds.TOKENS,
        help=f"of a prompt; default: {TOKENS['digits']} with --data digits, of texts those of the longest one, else "
        f"{MNIST_TOKENS}",
    )  # fmt: skip
    add_number(
        command, "--same-sign-share", float, SHARE, metavar="FLOAT",
        help="of a level's entries, those that a pruning may keep: sets the densities of the levels, unless --density "
        "does; default: 0.539, which leads to the paper's 3.46 %%",
    )  # fmt: skip
    command.add_argument("--json", type=utf8_path, metavar="FILE", help="write the plan there, too")
    add_configuration(command, lambda name: name != "match" and any(method.reads(name) for method in planned))


def add_compare(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run_compare, vary=[])
    add_choice(
        command, "--equal", ("steps", "parameters"), default="steps",
        help="what every method gets as much of; parameters: as many as LoRA of --rank trains, and as many steps; "
        "default: steps",
    )  # fmt: skip
    add_queue(command, Path("runs/compare"))


def add_sweep(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run_sweep)
    command.add_argument(
        "--vary", action="append", default=[], metavar="[METHOD:]FIELD=LIST",
        help="an option that takes each of these values, for all methods that read it or for one; may be repeated",
    )  # fmt: skip
    add_queue(command, Path("runs/sweep"))


def add_queue(command: argparse.ArgumentParser, out: Path) -> None:
    """The options of commands that make several runs."""
    add_preset(command, "quickstart")
    command.add_argument("--methods", required=True, metavar="LIST", help=f"some of {', '.join(METHODS)}")
    command.add_argument("--seeds", default="0", metavar="LIST", help="default: 0")
    command.add_argument("--out", type=utf8_path, default=out, help=f"folder of the runs; default: {out}")
    command.add_argument("--shard", default="1/1", metavar="I/N", help="run only part I of N, counted from 1")
    command.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    add_number(command, "--gpu-memory", float, GIBIBYTES, metavar="GIB", help="as for every run")
    add_configuration(command, lambda name: name not in ("seed", "match"))


def add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=utf8_path, metavar="RUN", help="run folder")
    add_choice(
        command,
        "--to",
        (*get_args(Format), "lora"),
        required=True,
        help="supertuning and shira: a folder that PEFT loads without this package; lora, and shira of a run of shira: "
        "the run's adapter as PEFT saves it; safetensors: what rigsa.load_adapter reads; merged: the whole model, "
        "which transformers loads",
    )
    command.add_argument("--out", type=utf8_path, help="folder to write; default: RUN/export/FORMAT")
    add_number(command, "--level", int, bounds.COUNT_OR_0, help="of the adapter; default: the last finished one")
    command.add_argument("--licence", default="", help="of the adapter, for its model card, such as apache-2.0")
    command.set_defaults(command=run_export)


def add_preset(command: argparse.ArgumentParser, default: str) -> None:
    add_choice(
        command, "--preset", PRESETS, default=default,
        help="where the other values come from: paper (SmolLM2-1.7B, a 24 GB GPU), quickstart (two CPU cores), "
        f"smoke (a check that everything runs); default: {default}",
    )  # fmt: skip


def add_configuration(
    command: argparse.ArgumentParser, belongs: Callable[[str], bool], default: str = "the preset's value"
) -> None:
    """One option per field of `Config` that belongs to the command."""
    group = command.add_argument_group(f"configuration (default: {default})")
    for field in OPTIONS.values():
        if not belongs(field.name):
            continue
        group.add_argument(
            f"--{flag(field.name)}",
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_help(field).replace("%", "%%"),
            **_how_to_parse(field),
        )


def _help(field: dataclasses.Field[Any]) -> str:
    expected = field.metadata["bound"].expected
    return f"{field.metadata['help']} ({expected})" if expected else field.metadata["help"]


def _how_to_parse(field: dataclasses.Field[Any]) -> dict[str, Any]:
    kind, choices = type(field.default), field.metadata["choices"]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices:
        return {"type": Choice(flag(field.name), choices), "metavar": one_of(choices)}
    converter = kind if kind is str else Number(flag(field.name), kind, field.metadata["bound"])
    return {"type": converter, "metavar": kind.__name__.upper()}


def one_of(choices: Iterable[str]) -> str:
    """What stands for the value of an option in its help, as argparse has it."""
    return f"{{{','.join(choices)}}}"


def add_choice(command: argparse.ArgumentParser, option: str, choices: Iterable[str], help: str, **how: Any) -> None:
    """An option that takes one of some words."""
    converter = Choice(option.removeprefix("--"), choices)
    command.add_argument(option, type=converter, metavar=one_of(choices), help=help, **how)


def add_number(command: argparse.ArgumentParser, option: str, kind: type, bound: Range, help: str, **how: Any) -> None:
    """An option that takes a number; its help states the range."""
    converter = Number(option.removeprefix("--"), kind, bound)
    command.add_argument(option, type=converter, help=f"{help} ({bound.expected})", **how)


def utf8_path(text: str) -> Path:
    """What argparse converts a path with. Raises RigsaError where its bytes are not UTF-8: no report could name it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RigsaError(f"expected a path in UTF-8, got {os.fsencode(text)!r}") from None
    return Path(text)


def configure(options: argparse.Namespace, device: str = "auto") -> Config:
    """The preset's configuration with the options of the command line; ``auto`` stands for `device`."""
    return configured(options.preset, options.method, given_fields(options), device)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Config` that the command line gave."""
    return {name: value for name, value in vars(options).items() if name in OPTIONS}


def resolve(options: argparse.Namespace) -> Config:
    """The configuration of a run: `configure`, and the run whose ticket it is matched to, if its method has that."""
    from rigsa.experiments.tasks.registry import recognise

    config = recognise(configure(options))
    other = config.method.matches
    if other and not config.match and not config.density:
        config = dataclasses.replace(config, match=str(default_out(other, options.preset, config.seed)))
    return config


def default_out(method: str, preset: str, seed: int) -> Path:
    return Path("runs") / f"{method}-{preset}-seed{seed}"


def run_method(options: argparse.Namespace) -> None:
    config = resolve(options)
    out = options.out or default_out(config.method.name, options.preset, config.seed)
    if options.dry_run:
        print(json.dumps(config.record(), indent=2))
        return
    quiet_libraries()
    from rigsa.experiments import distributed
    from rigsa.experiments.lock import folder_lock
    from rigsa.experiments.model import resolve_device

    if _interrupts:  # swallowed by an import
        raise KeyboardInterrupt
    distributed.join(on_cpu=resolve_device(config.device).type == "cpu")
    with folder_lock(out) if distributed.is_main() else contextlib.nullcontext():
        train_run(config, out, options.gpu_memory)
    distributed.leave()


def train_run(config: Config, out: Path, gpu_memory: float | None) -> None:
    """Check all that can be known, train, report. The main process has the lock of `out`."""
    from rigsa.experiments import distributed
    from rigsa.experiments.experiment import Experiment
    from rigsa.experiments.run_plan import describe
    from rigsa.experiments.tasks import source_tasks

    distributed.check(config)
    config.method.known_densities(config)  # says what is missing before a model is loaded
    source_tasks.check(config)
    check_folder(config, out)
    experiment = Experiment.prepare(config, out)
    source_tasks.check_content(config, experiment.task.conversation.tokenizer, experiment.task.asked())
    plans = plan_memory(experiment, gpu_memory)
    if distributed.is_main():
        print(describe(experiment, plans), flush=True)
    distributed.wait_for_all()  # until every process has checked the folder
    with distributed.main_first():
        save(config, out)
    if distributed.is_main():
        remove_temporaries(out)
    config.method.run(experiment)
    if distributed.is_main():
        print_report([out], out, experiment.task)


def plan_memory(experiment: Experiment, gpu_memory: float | None) -> list[LevelPlan]:
    """The plan of every level; none for a method that cannot be planned. Raises RigsaError if one does not fit."""
    from rigsa.experiments import distributed
    from rigsa.experiments.memory.plan import Target, require_fit

    config, device = experiment.config, experiment.model.device
    if not config.method.planned:
        return []
    # A plan is that of one process with a whole model, so it cannot refuse one in shards.
    memory = math.inf if distributed.is_sharding() else memory_of(device, gpu_memory)
    target = Target(experiment.model.config, config, device, experiment.task.size())
    return require_fit(target, densities_to_train(target), memory)


def densities_to_train(target: Target) -> dict[int, float]:
    """Level to density: known from another run's files, or expected."""
    from rigsa.experiments.memory.plan import expected_densities

    return target.config.method.known_densities(target.config) or expected_densities(target.shape, target.config)


def memory_of(device: torch.device, given: float | None) -> float:
    """The memory that a run may use, in bytes: what was given (in GiB), else the GPU's. A CPU has no limit."""
    if given is not None:
        return given * 2**30
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def run_plan(options: argparse.Namespace) -> None:
    quiet_libraries()
    from rigsa.experiments.memory.plan import SAME_SIGN_SHARE, Target
    from rigsa.experiments.memory.report import memory_report
    from rigsa.experiments.model import model_shape

    config = configure(options, device="cuda")
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    size = planned_size(config, options.tokens)
    share = SAME_SIGN_SHARE if options.same_sign_share is None else options.same_sign_share
    target = Target(model_shape(config.model), config, device, size)
    densities = planned_densities(target, options.preset, share)
    text, record = memory_report(target, densities, options.gpu_memory * 2**30)
    print(text)
    if options.json:
        write_json(options.json, record)


def planned_densities(target: Target, preset: str, same_sign_share: float) -> dict[int, float]:
    """Level to density. A control is planned before there is a run to match: as dense as the ticket of that level, or
    the last one, that its preset leads to. Raises RigsaError where the preset has no such ticket."""
    from rigsa.experiments.memory.plan import expected_densities

    config = target.config
    if not config.method.matches or config.density:
        return expected_densities(target.shape, config, same_sign_share)
    matched = PRESETS[preset](config.method.matches, config.device)
    last = matched.prunings
    expected = f"at most {last}, the last ticket of preset {preset}"
    require(config, "match_level", expected, config.match_level <= last)
    level = config.match_level or last
    return {level: expected_densities(target.shape, matched, same_sign_share)[level]}


def planned_size(config: Config, tokens: int | None) -> Size:
    """The largest row of a training batch: of so many tokens, or what the data say. Texts need the model's tokenizer.

    Raises:
        RigsaError: the data or the tokenizer cannot be read.
    """
    from rigsa.experiments.model import load_tokenizer, longest_of, model_shape
    from rigsa.experiments.tasks.registry import load_task
    from rigsa.experiments.tasks.task import Size

    if config.is_text and tokens is None:
        task = load_task(config)
        task.meet(load_tokenizer(config), longest_of(model_shape(config.model)))
        return task.size()
    known = tokens or TOKENS.get(config.data, MNIST_TOKENS)
    return Size(known, 1 if config.loss == "answer" and not config.is_text else known, packed=config.packing)


def run_compare(options: argparse.Namespace) -> None:
    from rigsa.experiments.comparison import decide, equal_budget
    from rigsa.experiments.sweep_plan import method_names

    quiet_libraries()
    given = equal_budget(method_names(options.methods), options.preset, given_fields(options), options.equal)

    def report(runs: Sequence[Path], out: Path) -> None:
        print_report(runs, out)
        print(f"\n{decide(runs, out)}")

    run_queue(options, given, report)


def run_sweep(options: argparse.Namespace) -> None:
    run_queue(options, given_fields(options), print_report)


def run_queue(
    options: argparse.Namespace, given: dict[str, Any], report: Callable[[Sequence[Path], Path], object]
) -> None:
    """Run, or print, the runs of a sweep or a comparison; `given` are fields of all their configurations."""
    from rigsa.experiments import sweep
    from rigsa.experiments.sweep_plan import Shard, plan_sweep

    plan = plan_sweep(
        options.methods, options.seeds, options.vary, preset=options.preset, options=given, out=options.out
    )
    shard = Shard.parse(options.shard)
    extra = [] if options.gpu_memory is None else [f"--gpu-memory={options.gpu_memory}"]
    if options.dry_run:
        sweep.print_commands(plan, shard, extra)
        return
    sweep.run_sweep(plan, report, shard=shard, extra=extra)


def run_report(options: argparse.Namespace) -> None:
    print_report(options.runs, options.out)


def print_report(runs: Sequence[Path], out: Path | None, task: Task | None = None) -> None:
    """Write the report, and show its table and where it is. The `task` is at hand at the end of a run."""
    from rigsa.experiments.report.page import write_report

    table, page = write_report(runs, out, task)
    print(f"\n{table}\n\nreport: {page}")


def run_measure(options: argparse.Namespace) -> None:
    quiet_libraries()
    from rigsa.experiments.lock import folder_lock
    from rigsa.experiments.measure_again import measure_again
    from rigsa.experiments.report.runs import read_report
    from rigsa.experiments.report.tables import source_table

    load(options.run)  # or the lock would make the folder
    with folder_lock(options.run):
        task = measure_again(options.run, given_fields(options))
        forgotten = source_table(read_report([options.run]))
        if forgotten is not None:  # the table of levels, below, has none of these numbers
            print(f"\n{forgotten.markdown()}")
        print_report([options.run], options.run, task)


def run_chat(options: argparse.Namespace) -> None:
    quiet_libraries()
    from rigsa.experiments import chat, distributed
    from rigsa.experiments.model import resolve_device

    distributed.join(on_cpu=resolve_device(load(options.run).device).type == "cpu")
    chat.run_chat(options.run, options.level, options.max_new_tokens)


def run_export(options: argparse.Namespace) -> None:
    quiet_libraries()
    from rigsa.experiments.export import export_run

    print(export_run(options.run, options.to, options.out, options.level, options.licence))


def run_merge(options: argparse.Namespace) -> None:
    quiet_libraries()
    from rigsa.experiments import merge

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    wishes = merge.Wishes(options.level, options.base, dtype, options.dequantize)
    print(merge.run_merge(options.source, options.out, wishes))


def run_inspect(options: argparse.Namespace) -> None:
    from rigsa.experiments import inspect_tickets

    print(inspect_tickets.run_inspect(options.sources, options.out))
    print(f"\nfigure: {options.out}")


def quiet_libraries() -> None:
    """Silence what libraries print on every start. Their errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that nothing here uses
    warnings.filterwarnings("ignore", module="torch.utils.data")


if __name__ == "__main__":
    sys.exit(main())
