"""Importing the other trainers' loss functions without the heavy packages beside them.

verl, OpenRLHF and AReaL import ray, vllm, flash-attn and more, which their loss functions never
use. Where these are not installed, empty modules stand in. For tests and benches alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

PACKAGES = {
    "areal": (
        *("aiofiles", "aiohttp", "fastapi", "flask", "httpx", "hydra", "lark"),
        *("msgspec", "numba", "openai", "orjson", "pebble", "PIL", "ray", "setproctitle"),
        *("tabulate", "tenacity", "torchdata", "uvicorn", "uvloop", "werkzeug", "zmq"),
    ),
    "verl": ("ray", "tensordict", "codetiming", "torchdata", "hydra", "orjson"),
    "openrlhf": (
        *("ray", "vllm", "deepspeed", "optree", "aiohttp", "peft", "bitsandbytes", "datasets"),
        *("pylatexenc", "torchdata"),
    ),
    "trl": (),
}
# Only these of flash-attn: with its cross entropy absent, the trainers run their own code.
MODULES = {
    "openrlhf": (
        *("flash_attn", "flash_attn.bert_padding", "flash_attn.utils"),
        "flash_attn.utils.distributed",
    ),
}


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StubFinder(MetaPathFinder, Loader):
    def __init__(self, packages: set[str], modules: set[str]) -> None:
        self.packages, self.modules = packages, modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self.modules or fullname.partition(".")[0] in self.packages:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stub has no body."""


def stand_in(peer: str) -> None:
    """Stubs for what `peer` imports and is not installed."""

    def absent(name: str) -> bool:
        return importlib.util.find_spec(name.partition(".")[0]) is None

    packages = {name for name in PACKAGES[peer] if absent(name)}
    modules = {name for name in MODULES.get(peer, ()) if absent(name)}
    sys.meta_path.append(_StubFinder(packages, modules))
