"""With this folder on PYTHONPATH, every process that imports PyTorch has the simulated device.

Python imports a module of this name when it starts. The device must be there before PyTorch is, and
most processes of a cluster never import it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _FirstImport(MetaPathFinder, Loader):
    """Finds torch once: loading the device imports it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "torch" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        sys.meta_path.remove(self)
        from tests.simulated_cuda.loading import load

        load()
        self._own = sys.modules["torch"].__spec__
        return sys.modules["torch"]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system has put the one above in its place


sys.meta_path.insert(0, _FirstImport())
