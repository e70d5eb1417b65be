"""What was promised, beside what the sections have measured: one table of a folder of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.journal import DONE, SKIPPED, read, rows
from benchmarks.gpu_proof.schedule import all_names
from benchmarks.gpu_proof.tables import all_tables
from benchmarks.providers import LEVEL_0_HALF, TICKET_NAME
from benchmarks.targets import GPU_TARGETS, SIZES, GpuTarget
from rigsa.files import write_json, write_text

Rows = list[dict[str, Any]]
MET, MISSED, UNFINISHED, UNKNOWN = "met", "NOT MET", "not finished", "not measured"


@dataclass(frozen=True)
class Line:
    """One row of the table, in words."""

    promised: str
    measured: str
    verdict: str


def write_summary(folder: Path, *, dry: bool = False) -> str:
    """Write summary.json and summary.md: what this gives back, and under it a table of each section that measures."""
    found = [*_checks(folder), *_ratios(folder), *_times(folder), *_memory(folder)]
    if dry:
        found = [replace(line, verdict=UNKNOWN) for line in found]
    sections = {name: read(folder, name) for name in all_names()}
    text = "\n".join([_head(folder, dry), "", table(found), "", _sections(sections), ""])
    write_text(folder / "summary.md", f"{text}\n{all_tables(folder)}\n")
    statuses = {name: record.get("status", "not run") for name, record in sections.items()}
    write_json(folder / "summary.json", {"lines": [asdict(line) for line in found], "sections": statuses})
    return text


def table(lines: list[Line]) -> str:
    cells = [f"| {line.promised} | {line.measured} | {line.verdict} |" for line in lines]
    return "\n".join(["| promised | measured | verdict |", "|---|---|---|", *cells])


def _head(folder: Path, dry: bool) -> str:
    record = read(folder, "environment") or read(folder, "environment_2")
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)
    ceilings = ", ".join(f"{row['ceiling']} {row['measured']:.0f} {row['unit']}" for row in record.get("rows", []))
    warning = "**A dry run on a CPU: no figure here says anything about a GPU.**\n\n" if dry else ""
    return f"{warning}{record.get('device', 'device unknown')}; {versions}; ceilings: {ceilings or 'not measured'}"


def _sections(sections: dict[str, dict[str, Any]]) -> str:
    """Which sections ran, and what became of those that did not end by themselves."""
    lines = []
    for name, record in sections.items():
        reason = record.get("reason", "").strip().splitlines()
        detail = f": {reason[-1]}" if reason else ""
        lines.append(f"- {name}: {record.get('status', 'not run')}, {record.get('seconds', 0):g} s{detail}")
    return "\n".join(lines)


# Checks: nothing may be wrong


CHECKED = {
    "correct": "Every kernel and path within the error bound of float64, repeating to the bit, outputs all written",
    "bits": "Initial values, selection and AdamW have the bits of the CPU",
    "behaviour": "No wait for the device; streams, graphs, compile, checkpointing, accumulation, autocast right",
    "peft": "PEFT's models train, switch off, save, load, merge and leave the base as it was",
    "sanitizer": "memcheck and racecheck find nothing",
    "gpu_tests": "The tests marked gpu pass",
}


def _checks(folder: Path) -> Iterator[Line]:
    for name, promised in CHECKED.items():
        record = read(folder, name)
        ran = [row for row in record.get("rows", []) if "skipped" not in row]
        wrong = sum(row.get("ok") is not True for row in ran)
        asked = f" of {record['cases']}" if "cases" in record else ""
        skipped = len(record.get("rows", [])) - len(ran)
        measured = f"{len(ran)}{asked} checked, {wrong} wrong" + (f", {skipped} skipped" if skipped else "")
        yield Line(promised, measured, _check_verdict(record, len(ran), wrong))


def _check_verdict(record: dict[str, Any], ran: int, wrong: int) -> str:
    if wrong:
        return MISSED
    if not ran:
        return UNKNOWN
    finished = record["status"] in (DONE, SKIPPED) and ran >= record.get("cases", 0)
    return MET if finished else UNFINISHED


# Ratios of two providers


def _ratios(folder: Path) -> Iterator[Line]:
    for target in GPU_TARGETS:
        ratios = dict(_pairs(target, rows(folder, target.question)))
        promised = f"{target.words}: {target.numerator} / {target.denominator} ≤ {target.bound:g}"
        if not ratios:
            yield Line(promised, "", UNKNOWN)
            continue
        place, worst = max(ratios.items(), key=lambda item: item[1])
        measured = f"{worst:.2f}"
        if len(ratios) > 1:
            measured = f"median {statistics.median(ratios.values()):.2f}, worst {worst:.2f} at {place}"
        yield Line(promised, measured, MET if worst <= target.bound else MISSED)


def _pairs(target: GpuTarget, found: Rows) -> Iterator[tuple[str, float]]:
    """Where, and the ratio, for each place in which both were measured."""
    measured = [row for row in found if target.field in row and target.matches(row)]
    for own in (row for row in measured if row["provider"] == target.numerator):
        if target.density is not None and own["density"] != target.density:
            continue
        others = [row for row in measured if row["provider"] == target.denominator and _place(row) == _place(own)]
        if others:
            yield _place(own), own[target.field] / min(row[target.field] for row in others)


def _place(row: dict[str, Any]) -> str:
    return " x ".join(str(row[name]) for name in ("m", "n", "k") if name in row)


# Single numbers


def _times(folder: Path) -> Iterator[Line]:
    found = {(row["what"], row.get("provider")): row.get("host_us") for row in rows(folder, "host")}
    plain = found.get(("forward and backward of a layer", "nn.Linear, trained"))
    for provider in ("gated, level 0", "gated, 3.46 %"):
        own = found.get(("forward and backward of a layer", provider))
        yield _host_line(provider, own, plain)
    yield _within("MaskedAdamW.step over 420 tensors ≤ 0.8 ms", found.get(("MaskedAdamW.step, 420 tensors", None)), 800)
    both, passes = (
        found.get((what, None)) for what in ("step in backward, 420 tensors", "the same passes without updates")
    )
    extra = both - passes if both is not None and passes is not None else None
    yield _within("--step-in-backward over 420 tensors ≤ 5 ms", extra, 5000)


def _host_line(provider: str, own: float | None, plain: float | None) -> Line:
    promised = f"Host time of a layer, {provider}: ≤ 1.25 times nn.Linear's, at most 60 µs more"
    if own is None or plain is None:
        return Line(promised, "", UNKNOWN)
    met = own <= 1.25 * plain and own - plain <= 60
    return Line(promised, f"{own:.0f} µs beside {plain:.0f} ({own / plain:.2f})", MET if met else MISSED)


def _within(promised: str, microseconds: float | None, limit: float) -> Line:
    if microseconds is None:
        return Line(promised, "", UNKNOWN)
    return Line(promised, f"{microseconds / 1e3:.2f} ms", MET if microseconds <= limit else MISSED)


def _memory(folder: Path) -> Iterator[Line]:
    """What was measured as a share of the plan; a plan keeps a tenth of the memory in reserve."""
    planned = {(row["size"], row["provider"]): row.get("peak_gib") for row in rows(folder, "planned")}
    for size, provider in product(SIZES, (TICKET_NAME, LEVEL_0_HALF)):
        promised = f"Peak memory of a step of SmolLM2-{size}: {provider} / what rigsa plan says ≤ 1.1"
        plan = planned.get((size, provider))
        peak = next((row.get("peak_gib") for row in rows(folder, f"steps_{size}") if row["provider"] == provider), None)
        if plan is None or peak is None:
            yield Line(promised, "", UNKNOWN)
        else:
            verdict = MET if peak <= 1.1 * plan else MISSED
            yield Line(promised, f"{peak:.2f} of {plan:.2f} GiB ({peak / plan:.2f})", verdict)
