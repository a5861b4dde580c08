"""Run a function after a vLLM module is imported, without importing it here: many processes never do, and the import
takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_asked: set[tuple[str, Callable[[], None]]] = set()


def after_import(name: str, function: Callable[[], None]) -> None:
    """Call ``function`` once the module of this name has been executed; immediately if it already has. Idempotent: a
    function is called once per process."""
    if (name, function) in _asked:
        return
    _asked.add((name, function))
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(MetaPathFinder):
    """Finds the module with the other finders, and calls the function after it has been executed."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name, self.function = name, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_both(module: ModuleType) -> None:
                run(module)
                self.function()

            spec.loader.exec_module = run_both  # type: ignore[method-assign]
        return spec
