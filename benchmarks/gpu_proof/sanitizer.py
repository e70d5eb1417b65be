"""compute-sanitizer's memcheck and racecheck over products, AdamW and selection, side by side."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import ROOT, Setting
from benchmarks.gpu_proof.small_kernels import KINDS
from benchmarks.race import UnavailableError

TOOLS = ("memcheck", "racecheck")
FOUND = 9
"""The exit code that the tool is told to give where it finds something."""
USUAL_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
REFUSED = "Device not supported"


def run(setting: Setting, journal: Journal) -> None:
    if setting.dry:
        for kind, small in KINDS.items():
            with journal.guarded(kernels=kind) as row:
                small("cpu")
                row["skipped"] = "a dry run: only the script was tried"
    tool = shutil.which("compute-sanitizer") or next((place for place in USUAL_PLACES if Path(place).exists()), None)
    if tool is None or setting.dry:
        raise UnavailableError("compute-sanitizer (of the CUDA toolkit) is not on the PATH, or this is a dry run")
    running = {names: _start(tool, *names, setting) for names in product(TOOLS, KINDS)}
    while running:
        for names, process in list(running.items()):
            if process.poll() is not None:
                del running[names]
                with journal.guarded(tool=names[0], kernels=names[1]) as row:
                    row |= _outcome(process.returncode, _log(setting, *names).read_text())
        time.sleep(0.1)


def _log(setting: Setting, tool: str, kind: str) -> Path:
    return setting.out / f"sanitizer_{tool}_{kind}.txt"


def _start(sanitizer: str, tool: str, kind: str, setting: Setting) -> subprocess.Popen[bytes]:
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, "-m", "benchmarks.gpu_proof.small_kernels", kind]
    with _log(setting, tool, kind).open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _outcome(code: int, text: str) -> dict[str, object]:
    if REFUSED in text:
        raise UnavailableError(f"compute-sanitizer: {REFUSED}")
    if code == 0:
        return {"ok": True}
    return {"ok": False, "error": f"exit code {code}: {text[:1500]} ... {text[-500:]}"}
