"""Putting our functions in the place of another trainer's, and its own back again.

A peer's modules import helpers from each other by name, so a function lives in many namespaces, and
some in a registry (a dict of a module) besides. A swap therefore goes through every loaded module
of the peer and exchanges the object wherever it is held; the modules that are loaded later find the
new one where it is defined. Restoring is the same walk the other way round, and so reaches modules
that were loaded in between.

Versions and names are checked before the first exchange: either all of it happens, or one error
says why not and the peer is as it was.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from rlhf_fast.errors import EnvironmentFault

_log = logging.getLogger(__name__)
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Replacement:
    """One function of a peer and what takes its place.

    Attributes:
        module: where the peer defines it.
        name: `function` or `Class.method` in that module.
        build: from the peer's own function to ours; ours may call it for options that it leaves
            to the peer.
    """

    module: str
    name: str
    build: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Entry:
    """Something new under a name of its own in a registry of a peer.

    Attributes:
        module: where the peer defines the registry.
        name: of the dict in that module, `dict` or `Class.dict`.
        key: what users ask for; taken out again when the peer gets its own functions back.
        value: what they get.
    """

    module: str
    name: str
    key: Any
    value: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def constant(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """`build` of a replacement that needs nothing of the peer's own function."""
    return lambda _own: function


@dataclass(frozen=True)
class Report:
    """What an adapter did.

    Attributes:
        peer: name of the package.
        version: the installed one.
        replaced: every place that holds one of our functions now, `module.name`.
        awaited: what will be replaced when the peer imports it.
    """

    peer: str
    version: str
    replaced: tuple[str, ...]
    awaited: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"rlhf_fast in {self.peer} {self.version}: {len(self.replaced)} replaced"]
        lines += [f"  {place}" for place in self.replaced]
        lines += [f"  {place} (once it is imported)" for place in self.awaited]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Swap:
    """An exchange that was made; `owner` is the class of a method, or None for a function."""

    owner: type | None
    name: str
    own: Any
    ours: Any

    def apply(self, package: str) -> None:
        self._exchange(package, self.own, self.ours)

    def undo(self, package: str) -> None:
        self._exchange(package, self.ours, self.own)

    def _exchange(self, package: str, old: Any, new: Any) -> None:
        if self.owner is not None:
            setattr(self.owner, self.name, new)
            return
        for _, namespace, key in _held(package, old):
            namespace[key] = new

    def places(self, package: str) -> list[str]:
        if self.owner is not None:
            return [f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"]
        return sorted({f"{name}.{key}" for name, _, key in _held(package, self.ours)})


@dataclass(frozen=True)
class _Added:
    """An entry that was made."""

    registry: dict[Any, Any]
    entry: Entry

    def apply(self, package: str) -> None:
        self.registry[self.entry.key] = self.entry.value

    def undo(self, package: str) -> None:
        self.registry.pop(self.entry.key, None)

    def places(self, package: str) -> list[str]:
        return [f"{self.entry}.{self.entry.key}"]


class Patch:
    """The replacements of one peer, switched on and off together.

    Args:
        package: name under which the peer is imported, and of its distribution.
        replacements: what to replace and to add, for each version of the peer that is supported.
    """

    def __init__(
        self, package: str, replacements: Mapping[str, Sequence[Replacement | Entry]]
    ) -> None:
        self.package = package
        self.replacements = replacements
        self._version = ""
        self._swaps: list[_Swap | _Added] = []
        self._awaiting: _AfterImport | None = None
        self._permanent = False
        self._blocks = 0  # open ones of `scoped`, of all threads

    def install(self, *, on_import: bool = False) -> Report:
        """Replace for good, also from within a block of `scoped`; a second call changes nothing.

        Args:
            on_import: replace in the modules that the peer has loaded, and in each other one as
                soon as the peer loads it. Without it the modules are loaded now.

        Raises:
            EnvironmentFault: the peer is missing (RF7301), of an unknown version (RF7302), lacks a
                name (RF7303) or cannot be imported (RF7304). Nothing has been replaced.
        """
        with _LOCK:
            report = self._replace(on_import)
            self._permanent = True
        return report

    def _replace(self, on_import: bool = False) -> Report:
        if not self._version:
            version = require_version(self.package, self.replacements)
            wanted = self.replacements[version]
            now = [r for r in wanted if not on_import or r.module in sys.modules]
            self._apply(now, version)
            later = [r for r in wanted if r not in now]
            if later:
                self._awaiting = _AfterImport(later, lambda found: self._apply(found, version))
                sys.meta_path.insert(0, self._awaiting)
            self._version = version
            _log.info("%s", self.report())
        return self.report()

    def check(self) -> None:
        """What `install` checks, with the same errors, and no more: nothing is replaced."""
        if not self._version:
            version = require_version(self.package, self.replacements)
            _find(self.replacements[version], self.package, version)

    def remove(self) -> None:
        """Give the peer its own functions back, wherever ours are held."""
        if self._awaiting is not None:
            sys.meta_path.remove(self._awaiting)
            self._awaiting = None
        for swap in reversed(self._swaps):
            swap.undo(self.package)
        self._swaps.clear()
        self._version = ""
        self._permanent = False

    @contextmanager
    def scoped(self) -> Iterator[Report]:
        """Replace inside a `with` block.

        The last of several that overlap, nested or in threads, gives the peer its own functions
        back, unless `install` has replaced them for good.
        """
        with _LOCK:
            report = self._replace()
            self._blocks += 1
        try:
            yield report
        finally:
            with _LOCK:
                self._blocks -= 1
                if self._blocks == 0 and not self._permanent:
                    self.remove()

    def report(self) -> Report:
        """What is replaced at this moment."""
        places = [place for swap in self._swaps for place in swap.places(self.package)]
        awaited = () if self._awaiting is None else tuple(map(str, self._awaiting.awaited))
        return Report(self.package, self._version, tuple(dict.fromkeys(places)), awaited)

    def _apply(self, wanted: Sequence[Replacement | Entry], version: str) -> None:
        swaps = _find(wanted, self.package, version)
        for swap in swaps:
            swap.apply(self.package)
        self._swaps += swaps


def require_version(package: str, supported: Iterable[str]) -> str:
    """The installed version of a peer, without what a build adds to it.

    Raises:
        EnvironmentFault: the peer is missing (RF7301) or of another version (RF7302).
    """
    versions = tuple(supported)
    named = ", ".join(versions)
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            "RF7301",
            f"{package} is not installed",
            expected=f"{package} {named}",
            remedy=f"pip install {package}=={versions[0]}",
        ) from error
    version = installed.partition("+")[0]
    if version not in versions:
        raise EnvironmentFault(
            "RF7302",
            f"{package} {installed} is not a version that was tested",
            expected=f"{package} {named}; nothing of it was replaced",
            remedy="install one of these, or train without the adapter",
        )
    return version


def _find(
    wanted: Sequence[Replacement | Entry], package: str, version: str
) -> list[_Swap | _Added]:
    """The swap of every replacement, or one error that names all that are missing."""
    swaps: list[_Swap | _Added] = []
    missing = []
    for replacement in wanted:
        owner_name, _, name = replacement.name.rpartition(".")
        module = _import(replacement.module, package, version)
        owner = vars(module).get(owner_name) if owner_name else None
        holder = module if not owner_name else owner
        own = None if holder is None else vars(holder).get(name)
        if isinstance(replacement, Entry):
            if not isinstance(own, dict):
                missing.append(str(replacement))
                continue
            swaps.append(_Added(own, replacement))
            continue
        if not callable(own):
            missing.append(str(replacement))
            continue
        swaps.append(_Swap(owner, name, own, replacement.build(own)))
    if missing:
        raise EnvironmentFault(
            "RF7303",
            f"{package} {version} lacks what the adapter replaces: {', '.join(missing)}",
            expected=f"{package} {version} as published; nothing of it was replaced",
            remedy=f"reinstall {package}, or train without the adapter",
        )
    return swaps


def _import(name: str, package: str, version: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise EnvironmentFault(
                "RF7303",
                f"{package} {version} lacks what the adapter replaces: {name}",
                expected=f"{package} {version} as published; nothing of it was replaced",
                remedy=f"reinstall {package}, or train without the adapter",
            ) from error
        raise _cannot_import(name, error) from error
    except ImportError as error:
        raise _cannot_import(name, error) from error


def _cannot_import(name: str, error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(
        "RF7304",
        f"{name} cannot be imported: {error}",
        expected="a peer whose own imports work; nothing of it was replaced",
        remedy="install what it needs",
    )


# ---- who holds an object ------------------------------------------------------------------------


def _namespaces(package: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Namespaces of the peer's loaded modules, and the dicts in them (its registries)."""
    for name, module in list(sys.modules.items()):
        if (name != package and not name.startswith(package + ".")) or module is None:
            continue
        # Not getattr: a lazy module would import what it is asked for.
        namespace = vars(module)
        yield name, namespace
        for key, value in list(namespace.items()):
            if type(value) is dict and not key.startswith("__"):
                yield f"{name}.{key}", value


def _held(package: str, wanted: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    for name, namespace in _namespaces(package):
        for key, value in list(namespace.items()):
            if value is wanted:
                yield name, namespace, key


# ---- modules that are not loaded yet ------------------------------------------------------------


class _AfterImport(MetaPathFinder):
    """Calls `apply` with the replacements of a module as soon as it has been imported."""

    def __init__(
        self,
        awaited: Iterable[Replacement | Entry],
        apply: Callable[[list[Replacement | Entry]], None],
    ) -> None:
        self.awaited = list(awaited)
        self._apply = apply
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._searching or all(r.module != fullname for r in self.awaited):
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader, lambda: self._imported(fullname))
        return spec

    def _imported(self, module: str) -> None:
        found = [r for r in self.awaited if r.module == module]
        self._apply(found)
        self.awaited = [r for r in self.awaited if r.module != module]


class _Announcing(Loader):
    """A module's own loader, followed by a call."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._then()
