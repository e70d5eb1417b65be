"""Have a function called when a package has been imported, without importing it: `import rigsa` registers with PEFT."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def when_imported(package: str, function: Callable[[], object]) -> None:
    """Call ``function()`` as soon as `package` is imported: at once where it is already."""
    if package in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Watcher(package, function))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one package in the way that it would have been found, and steps aside from then on."""

    def __init__(self, package: str, function: Callable[[], object]) -> None:
        self.package, self.function = package, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # it is not installed, now
            return spec
        spec.loader = _Loader(spec.loader, self.function)
        return spec


class _Loader(importlib.abc.Loader):
    """The package's own loader, and a call after it has run the package. The package keeps its own."""

    def __init__(self, own: Any, function: Callable[[], object]) -> None:
        self.own, self.function = own, function

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        self.function()
