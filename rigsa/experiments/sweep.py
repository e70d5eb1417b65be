"""Methods x seeds x settings: a queue of run folders that goes on where it stopped.

::

    python -m rigsa.run sweep --methods imp,random-mask,lora --seeds 0,1,2 --vary lora:rank=1,4,8,16 --out runs/sweep

A sweep folder::

    sweep.json          the plan of the last command
    NAME/               a run folder (`rigsa.experiments.run_folder`), and in it:
    NAME/run.log        what the run printed, every attempt
    NAME/failed.json    exit code and last lines, while the last attempt failed
    NAME/done           written last
    report.md, ...      written when every run is done

Each run is a process of its own, so that one that crashes does not end the others. The same command goes on: it skips
runs that are done and tries failed ones again. A command with more methods, seeds or values adds runs; one that would
change a run that is there is refused, and runs that it leaves out stay as they are. What another run of the sweep has
measured or trained already is copied, not made again (`rigsa.experiments.shared_results`).

The cluster's scheduler does the scheduling. An array job starts one shard a task, each on the GPU that it was given::

    #SBATCH --array=1-8 --gpus=1
    python -m rigsa.run sweep --methods imp,random-mask --seeds 0,1,2,3 --out runs/sweep --shard $SLURM_ARRAY_TASK_ID/8

Shards start and end at any time; the last one to finish writes the report. Where several GPUs are on one machine, start
a shard for each with its own CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from rigsa.errors import RigsaError
from rigsa.experiments.config_file import check_folder
from rigsa.experiments.lock import LOCK_FILE, InUseError, folder_lock, locked
from rigsa.experiments.measures import accuracies
from rigsa.experiments.presets import arguments_of
from rigsa.experiments.run_folder import CONFIG_FILE, FAILED_FILE, OUTPUT_FILE
from rigsa.experiments.shared_results import share_results
from rigsa.experiments.sweep_plan import WHOLE, Job, Plan, Shard
from rigsa.files import is_done, is_temporary, mark_done, write_json

SWEEP_FILE = "sweep.json"
TRACES = {CONFIG_FILE, FAILED_FILE, OUTPUT_FILE, LOCK_FILE}
"""All that a run leaves which failed before it measured anything: another configuration may take its place."""

GRACE = 60.0
"""Seconds that an interrupted run has to end by itself."""
MESSAGE_LINES = 10
IN_USE = "skipped, as another process is running it"

Runner = Callable[[Sequence[str], BinaryIO], int]
"""Run a command, its output into an open file. Returns the exit code, ``-n`` after signal n."""


def command_of(job: Job, plan: Plan, extra: Sequence[str] = ()) -> list[str]:
    """What runs `job` in a process of its own."""
    options = ["--preset", plan.preset, *arguments_of(job.config, plan.preset), *extra]
    return [sys.executable, "-m", "rigsa.run", job.config.method.name, *options, "--out", str(plan.folder(job))]


def run_logged(command: Sequence[str], log: BinaryIO) -> int:
    """The `Runner` of a sweep. An interrupt is passed on to the run, and raised again once that has ended."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C must not reach the run twice
        env={"TQDM_MININTERVAL": "60"} | os.environ,  # a progress bar a minute is enough for a file
    )  # fmt: skip
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()  # no loss: a run goes on from its last checkpoint
            process.wait()
        raise


def run_sweep(
    plan: Plan,
    report: Callable[[list[Path], Path], object],
    *,
    shard: Shard = WHOLE,
    extra: Sequence[str] = (),
    run: Runner = run_logged,
) -> None:
    """Run the jobs of a shard that are not done, one after another, and report the whole sweep once all are.

    Args:
        plan: from `plan_sweep`.
        report: called with the run folders of all shards and the sweep folder.
        shard: which jobs.
        extra: further options of every run.
        run: how a command is run.

    Raises:
        RigsaError: before anything is written, where a folder holds something else; at the end, where runs did not
            finish.
        KeyboardInterrupt: after the current run was interrupted and has ended.
    """
    jobs = shard.of(plan.jobs)
    _check_folders(plan, jobs)
    with locked(plan.out / LOCK_FILE, wait=True):
        write_json(plan.out / SWEEP_FILE, plan.record())
    unfinished: dict[str, str] = {}
    with _terminable():
        for number, job in enumerate(jobs, 1):
            print(f"[{number}/{len(jobs)}] {job.name}: ", end="", flush=True)
            with locked(plan.folder(job) / OUTPUT_FILE) as log:
                reason = _attempt(job, plan, extra, run, log, unfinished)
            if not reason:
                try:
                    print("{headline} at level {level}, {seconds} s".format(**_result(plan.folder(job))))
                except RigsaError as error:
                    reason = f"done, but {error}"
            if reason:
                unfinished[job.name] = reason
                print(reason)
    if jobs:
        print(f"\n{_table(plan, jobs, unfinished)}")
    if unfinished:
        raise RigsaError(
            f"{len(unfinished)} of {len(jobs)} runs did not finish: {', '.join(unfinished)}. The same command tries "
            f"them again; `rigsa report {plan.out}` shows the others."
        )
    with locked(plan.out / LOCK_FILE, wait=True):
        if all(is_done(plan.folder(job)) for job in plan.jobs):
            report([plan.folder(job) for job in plan.jobs], plan.out)


def print_commands(plan: Plan, shard: Shard, extra: Sequence[str] = ()) -> None:
    """What `run_sweep` would run, one command a line. Raises RigsaError where it would refuse to."""
    jobs = shard.of(plan.jobs)
    _check_folders(plan, jobs)
    for job in jobs:
        print(shlex.join(command_of(job, plan, extra)))


def _check_folders(plan: Plan, jobs: list[Job]) -> None:
    """Only this shard's: another one may be about to write its first file."""
    if plan.out.exists() and not plan.out.is_dir():
        raise RigsaError(f"{plan.out} is a file; choose another --out")
    others = [path for path in plan.out.glob("*") if not path.name.startswith(".")]
    if others and not (plan.out / SWEEP_FILE).exists():
        raise RigsaError(f"{plan.out} is not a sweep folder and not empty; choose another one with --out")
    for job in jobs:
        _check_run_folder(job, plan.folder(job))


def _check_run_folder(job: Job, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names or {name for name in names if not is_temporary(name)} - TRACES:
        check_folder(job.config, folder)


def _attempt(
    job: Job, plan: Plan, extra: Sequence[str], run: Runner, log: BinaryIO | None, unfinished: dict[str, str]
) -> str:
    """Run a job unless it is done. Returns why it is not finished, '' where it is."""
    folder = plan.folder(job)
    if log is None:
        return IN_USE
    if is_done(folder):
        return ""
    if job.depends_on in unfinished:
        return f"skipped, as {job.depends_on} did not finish"
    try:
        with folder_lock(folder):
            _check_run_folder(job, folder)  # again: another command may have begun a run there since
            (folder / FAILED_FILE).unlink(missing_ok=True)
            write_json(folder / CONFIG_FILE, job.config.record())
            share_results(job, plan)
    except InUseError:
        return IN_USE
    command = command_of(job, plan, extra)
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    start = log.tell()
    code = run(command, log)
    if code == 0:
        mark_done(folder)
        return ""
    with (folder / OUTPUT_FILE).open("rb") as printed:
        printed.seek(start)
        message = last_words(printed.read().decode(errors="replace"))
    write_json(folder / FAILED_FILE, {"exit_code": code, "message": message})
    lines = [f"failed, {describe_exit(code)}; see {folder / OUTPUT_FILE}", *message.splitlines()]
    return "\n    ".join(lines)


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def last_words(text: str) -> str:
    """The error that ended a run's output, or its last lines; without progress bars."""
    lines = [line.rstrip() for line in text[max(text.rfind("rigsa: "), 0) :].splitlines()]
    return "\n".join([line for line in lines if line and "%|" not in line][-MESSAGE_LINES:])


def _result(folder: Path) -> dict[str, str]:
    """What the table says of a finished run: its last level, the headline there and the seconds of training."""
    from rigsa.experiments.report.runs import Run

    run = Run.read(folder)
    last, headline = run.levels[-1], accuracies(run.config)[0]
    return {
        "level": str(last["level"]),
        "headline": f"{headline.of(last):.2f} %",
        "seconds": f"{sum(level['train_seconds'] for level in run.levels):.0f}",
    }


def _table(plan: Plan, jobs: list[Job], unfinished: dict[str, str]) -> str:
    """A line a run, columns padded."""
    config = plan.jobs[0].config
    rows = [["run", "level", accuracies(config)[0].name if config.is_text else "test accuracy", "seconds"]]
    for job in jobs:
        if job.name in unfinished:
            rows.append([job.name, unfinished[job.name].split(",")[0], "", ""])
        else:
            rows.append([job.name, *_result(plan.folder(job)).values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, of a scheduler's time limit, and SIGHUP, of a closed terminal, end a sweep as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
