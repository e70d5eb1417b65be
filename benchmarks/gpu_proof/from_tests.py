"""The oracle of the tests: inputs, the truth in float64, and a bound that is not tuned. And their small model."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

from benchmarks.gpu_proof.setting import ROOT


@cache
def load(name: str) -> ModuleType:
    """tests/NAME.py, which is no package's."""
    path = ROOT / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_rigsa_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
