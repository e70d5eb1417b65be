"""The versions that are asked for fit each other, on a machine with a GPU and on one without."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
EXTRAS = PROJECT["optional-dependencies"].values()
ASKED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS) for line in lines]

# "Requires-Dist: triton==..." in the METADATA of torch's default wheel for Linux, which is the CUDA build. The CPU
# build that a machine without a GPU may take names no triton.
TRITON_OF_CUDA_BUILD = {
    "2.9.0": "3.5.0", "2.9.1": "3.5.1", "2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.12.1": "3.7.1",
    "2.13.0": "3.7.1", "2.14.0": "3.8.0", "2.14.1": "3.8.0", "2.15.0": "3.9.0",
}  # fmt: skip


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_pins_are_what_the_project_asks_for(requirement):
    assert requirement.name not in PINS or requirement.specifier.contains(PINS[requirement.name])


def test_the_cuda_build_of_torch_takes_the_pinned_triton():
    assert TRITON_OF_CUDA_BUILD[PINS["torch"]] == PINS["triton"]


def test_the_torch_that_is_installed_takes_the_pinned_triton():
    asked = [Requirement(line) for line in requires("torch")]
    for requirement in asked:
        if requirement.name == "triton" and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(PINS["triton"])


def test_types_are_found_after_an_editable_install(tmp_path):
    """Type checkers and editors follow a path, and no import hook."""
    project = tmp_path / "project"
    unwanted = shutil.ignore_patterns(".*", "docs", "tests", "benchmarks", "experiments", "__pycache__")
    shutil.copytree(ROOT, project, ignore=unwanted)
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        (link,) = (name for name in wheel.namelist() if ".dist-info/" not in name)
        assert link.endswith(".pth")
        assert wheel.read(link).decode().split() == [str(project)]
    for package in ("rigsa", "rigsa_kernels"):
        assert (project / package / "py.typed").exists()


@pytest.mark.parametrize("torch", TRITON_OF_CUDA_BUILD)
def test_every_torch_that_may_be_installed_brings_a_triton_that_kernels_compile_with(torch):
    pytest.importorskip("triton")
    from rigsa_kernels.triton_common import MIN_TRITON

    assert any(line.name == "torch" and line.specifier.contains(torch) for line in ASKED)
    assert tuple(map(int, TRITON_OF_CUDA_BUILD[torch].split(".")[:2])) >= MIN_TRITON


def test_a_triton_that_is_too_old_is_one_clear_error():
    pytest.importorskip("triton")
    code = "import triton; triton.__version__ = '3.4.1'; import rigsa_kernels.triton_linear"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert error == "RuntimeError: triton: expected 3.5 or newer, which PyTorch 2.9 and newer bring, got 3.4.1"
