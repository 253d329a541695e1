"""Switching on and off, on a small peer that is written here: needs none of the real ones."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.patching import Entry, Patch, Replacement, constant

MATHS = """
def double(x):
    return 2 * x

class Loss:
    def forward(self, x):
        return x

REGISTRY = {"double": double}

class Factory:
    known = {"double": double}
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`toypeer` 1.2.3: `maths` defines, `early` and `late` import by name. Sets its version."""
    package = tmp_path / "toypeer"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text(MATHS)
    for name in ("early", "late"):
        (package / f"{name}.py").write_text("from toypeer.maths import double as twice\n")
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")

    def publish(version: str) -> None:
        info = tmp_path / "toypeer.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: toypeer\nVersion: {version}\n"
        )

    publish("1.2.3")
    monkeypatch.syspath_prepend(tmp_path)
    yield publish
    for name in [m for m in sys.modules if m.partition(".")[0] == "toypeer"]:
        del sys.modules[name]


def triple(x: int) -> int:
    return 3 * x


def _negated(own: Callable[..., int]) -> Callable[..., int]:
    return lambda self, x: -own(self, x)


DOUBLE = Replacement("toypeer.maths", "double", constant(triple))
FORWARD = Replacement("toypeer.maths", "Loss.forward", _negated)


def make(*replacements: Replacement | Entry, versions: tuple[str, ...] = ("1.2.3",)) -> Patch:
    return Patch("toypeer", dict.fromkeys(versions, replacements or (DOUBLE, FORWARD)))


def load(name: str) -> Any:
    return importlib.import_module(f"toypeer.{name}")


@pytest.mark.usefixtures("peer")
def test_a_scope_replaces_everywhere_and_restores_everywhere() -> None:
    early, maths = load("early"), load("maths")
    own, own_forward = maths.double, maths.Loss.forward
    with make().scoped() as report:
        late = load("late")
        assert early.twice is late.twice is maths.double is maths.REGISTRY["double"] is triple
        assert maths.Loss().forward(5) == -5
    assert early.twice is late.twice is maths.double is maths.REGISTRY["double"] is own
    assert maths.Loss.forward is own_forward
    assert report.replaced == (
        "toypeer.early.twice",
        "toypeer.maths.REGISTRY.double",
        "toypeer.maths.double",
        "toypeer.maths.Loss.forward",
    )
    assert (report.peer, report.version) == ("toypeer", "1.2.3")
    assert "toypeer.maths.Loss.forward" in str(report)


@pytest.mark.usefixtures("peer")
def test_an_entry_of_a_registry_is_there_inside_the_scope_alone() -> None:
    maths = load("maths")
    entry = Entry("toypeer.maths", "REGISTRY", "triple", triple)
    with make(DOUBLE, entry).scoped() as report:
        assert {"double": triple, "triple": triple} == maths.REGISTRY
        assert report.replaced.count("toypeer.maths.REGISTRY.triple") == 1
    assert list(maths.REGISTRY) == ["double"]
    assert maths.REGISTRY["double"] is maths.double


@pytest.mark.usefixtures("peer")
def test_a_registry_may_be_of_a_class() -> None:
    factory = load("maths").Factory
    patch = make(Entry("toypeer.maths", "Factory.known", "triple", triple))
    with patch.scoped() as report:
        assert factory.known["triple"] is triple
        assert report.replaced == ("toypeer.maths.Factory.known.triple",)
    assert list(factory.known) == ["double"]


@pytest.mark.usefixtures("peer")
def test_an_entry_waits_for_its_module_like_a_replacement() -> None:
    patch = make(Entry("toypeer.maths", "REGISTRY", "triple", triple))
    assert patch.install(on_import=True).awaited == ("toypeer.maths.REGISTRY",)
    assert load("maths").REGISTRY["triple"] is triple
    patch.remove()
    assert "triple" not in load("maths").REGISTRY


@pytest.mark.usefixtures("peer")
@pytest.mark.parametrize("name", ["GONE", "double", "Factory.gone", "Gone.known"])
def test_a_registry_that_is_not_there_is_an_error_and_nothing_is_replaced(name: str) -> None:
    own = load("maths").double
    with pytest.raises(EnvironmentFault, match=rf"RF7303.*toypeer\.maths\.{name}"):
        make(DOUBLE, Entry("toypeer.maths", name, "triple", triple)).install()
    assert load("maths").double is own


@pytest.mark.usefixtures("peer")
def test_a_scope_restores_after_an_exception() -> None:
    maths = load("maths")
    own = maths.double
    with pytest.raises(KeyError), make().scoped():
        raise KeyError
    assert maths.double is own


@pytest.mark.usefixtures("peer")
def test_installing_is_for_good_and_a_scope_inside_it_takes_nothing_back() -> None:
    maths, patch = load("maths"), make()
    own = maths.double
    first = patch.install()
    assert patch.install() == first
    with patch.scoped() as report:
        assert report == first
    assert maths.double is triple
    patch.remove()
    assert maths.double is own
    assert patch.report().replaced == ()


@pytest.mark.usefixtures("peer")
def test_installing_within_a_scope_is_for_good_too() -> None:
    maths, patch = load("maths"), make()
    own = maths.double
    with patch.scoped():
        patch.install()
    assert maths.double is triple
    patch.remove()
    with patch.scoped():
        pass
    assert maths.double is own


@pytest.mark.usefixtures("peer")
def test_the_last_of_scopes_that_overlap_restores() -> None:
    maths, patch = load("maths"), make()
    own = maths.double
    first, second = patch.scoped(), patch.scoped()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert maths.double is triple
    second.__exit__(None, None, None)
    assert maths.double is own


@pytest.mark.usefixtures("peer")
def test_on_import_loads_nothing_and_replaces_what_is_imported_later() -> None:
    patch = make()
    report = patch.install(on_import=True)
    assert "toypeer.maths" not in sys.modules
    assert report.replaced == ()
    assert report.awaited == ("toypeer.maths.double", "toypeer.maths.Loss.forward")
    early = load("early")
    assert early.twice is triple
    assert patch.report().awaited == ()
    assert "toypeer.early.twice" in patch.report().replaced
    patch.remove()
    assert early.twice(1) == 2


@pytest.mark.usefixtures("peer")
def test_on_import_after_removal_replaces_nothing() -> None:
    patch = make()
    finders = list(sys.meta_path)
    patch.install(on_import=True)
    patch.remove()
    assert sys.meta_path == finders
    assert load("early").twice(1) == 2


@pytest.mark.usefixtures("peer")
def test_on_import_says_what_is_missing_when_the_module_is_imported() -> None:
    patch = make(DOUBLE, Replacement("toypeer.maths", "gone", constant(triple)))
    patch.install(on_import=True)
    with pytest.raises(EnvironmentFault, match=r"RF7303.*toypeer\.maths\.gone"):
        load("maths")
    patch.remove()
    assert load("early").twice(1) == 2


def test_a_local_build_of_a_version_is_that_version(peer: Callable[[str], None]) -> None:
    peer("1.2.3+cu128")
    with make().scoped() as report:
        assert report.version == "1.2.3"


def test_an_unknown_version_is_refused_before_anything_is_imported(
    peer: Callable[[str], None],
) -> None:
    peer("1.3.0")
    with pytest.raises(EnvironmentFault, match=r"RF7302: toypeer 1\.3\.0") as caught:
        make(versions=("1.2.3", "1.2.4")).install()
    assert "1.2.3, 1.2.4" in caught.value.expected
    assert "toypeer.maths" not in sys.modules


@pytest.mark.parametrize(
    "gone",
    [
        Replacement("toypeer.maths", "gone", constant(triple)),
        Replacement("toypeer.maths", "Loss.gone", constant(triple)),
        Replacement("toypeer.maths", "Gone.forward", constant(triple)),
        Replacement("toypeer.gone", "double", constant(triple)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("peer")
def test_a_moved_name_is_one_error_and_the_peer_is_as_it_was(gone: Replacement) -> None:
    maths = load("maths")
    own, own_forward = maths.double, maths.Loss.forward
    patch = make(DOUBLE, FORWARD, gone)
    with pytest.raises(EnvironmentFault, match="RF7303") as caught:
        patch.install()
    assert gone.module in caught.value.what
    assert maths.double is own
    assert maths.Loss.forward is own_forward
    assert patch.report().replaced == ()


@pytest.mark.usefixtures("peer")
def test_all_moved_names_of_a_module_are_in_one_error() -> None:
    gone = [Replacement("toypeer.maths", name, constant(triple)) for name in ("one", "two")]
    with pytest.raises(EnvironmentFault, match=r"toypeer\.maths\.one, toypeer\.maths\.two"):
        make(*gone).install()


@pytest.mark.usefixtures("peer")
def test_a_module_of_the_peer_that_cannot_be_imported() -> None:
    patch = make(DOUBLE, Replacement("toypeer.broken", "double", constant(triple)))
    with pytest.raises(EnvironmentFault, match=r"RF7304.*a_package_that_is_not_there"):
        patch.install()
    assert load("maths").double(1) == 2


def test_a_peer_that_is_not_installed() -> None:
    patch = Patch("toypeer_absent", {"1.0": (DOUBLE,)})
    with pytest.raises(EnvironmentFault, match="RF7301") as caught:
        patch.install()
    assert "pip install toypeer_absent==1.0" in caught.value.remedy


@pytest.mark.parametrize("name", ["areal", "openrlhf", "slime", "trl", "verl"])
def test_an_adapter_imports_without_its_peer(name: str) -> None:
    """Checked in a process of its own: here another test may have imported the peer."""
    code = (
        f"import sys, rlhf_fast.integrations.{name} as adapter;"
        f"assert {name!r} not in sys.modules; adapter.uninstall()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
