"""Static rules of the sources: nothing that runs a file's code, no import that forces an extra."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450

# A pickle runs code when it is read; so do eval, exec and a model repository's own modules.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads"),
    *("joblib.load", "cloudpickle.load", "cloudpickle.loads", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load", "os.system"),
}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Optional packages and other trainers: imported inside the function that needs them.
LAZY = {"trl", "verl", "openrlhf", "deepspeed", "flash_attn", "vllm", "wandb", "trackio"}
LAZY |= {"datasets", "matplotlib", "tensorboard", "pyarrow"}


def _python_files(*roots: str) -> list[Path]:
    return sorted(path for root in roots for path in (ROOT / root).rglob("*.py"))


SOURCES = _python_files("rlhf_fast", "kernels")
ALL_PYTHON = [*SOURCES, *_python_files("tests", "bench", "examples"), ROOT / "setup.py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, `if TYPE_CHECKING:` left out."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            yield from _at_import_time(getattr(statement, inner, []))
        for handler in getattr(statement, "handlers", []):
            yield from _at_import_time(handler.body)


def _imported(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or "").partition(".")[0]}
    return set()


def dangers(source: str) -> list[str]:
    """`line: what` of everything in a source that could run code it was handed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}()")
            if any(k.arg == "shell" and _is_true(k.value) for k in node.keywords):
                found.append(f"{node.lineno}: shell=True")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else [f"{node.value.lineno}: trust_remote_code"]
        if isinstance(node, ast.Dict):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
            found += [f"{node.lineno}: {k}" for k in keys if k == "trust_remote_code"]
        if isinstance(node, ast.stmt):
            found += [f"{node.lineno}: import {n}" for n in _imported(node) & FORBIDDEN_IMPORTS]
    return found


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def eager_imports(source: str) -> list[str]:
    """`line: package` of optional packages imported together with the module."""
    return [
        f"{statement.lineno}: {package}"
        for statement in _at_import_time(ast.parse(source).body)
        for package in sorted(_imported(statement) & LAZY)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_source_runs_code_from_a_file(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert eager_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch.load('x')", 1),
        ("import pickle\npickle.loads(b'')", 2),
        ("from pickle import loads", 1),
        ("eval('1')", 1),
        ("model.eval()", 0),
        ("f(trust_remote_code=True)", 1),
        ("f(trust_remote_code=False)", 0),
        ("f(**{'trust_remote_code': x})", 1),
        ("subprocess.run('ls', shell=True)", 1),
    ],
)
def test_the_search_for_dangers_finds_them(source: str, count: int) -> None:
    assert len(dangers(source)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import wandb", 1),
        ("try:\n    import flash_attn\nexcept ImportError:\n    import vllm", 2),
        ("class A:\n    from trl import PPOTrainer", 1),
        ("def f():\n    import wandb", 0),
        ("if TYPE_CHECKING:\n    import datasets", 0),
        ("import torch", 0),
    ],
)
def test_the_search_for_eager_imports_finds_them(source: str, count: int) -> None:
    assert len(eager_imports(source)) == count


def test_the_kernels_folder_is_no_package() -> None:
    """A published package is called `kernels`: an `__init__.py` here would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _texts(tree: ast.Module) -> list[str]:
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


@pytest.mark.parametrize("path", ALL_PYTHON, ids=_name)
def test_imports_are_absolute_but_in_bench_which_has_two_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    if _name(path).startswith("bench/"):
        names = [
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        ]
        names += [node.module or "" for node in imports if not node.level]
        # Of modules that are started: `python -m` takes them as text.
        names += [text for text in _texts(tree) if re.fullmatch(r"bench(\.\w+)+", text)]
        assert not [n for n in names if n.split(".")[0] in ("bench", "rlhf_fast_bench")]
    else:
        assert [node.lineno for node in imports if node.level] == []


def test_files_stay_readable_in_one_sitting() -> None:
    files = [*SOURCES, *_python_files("bench"), ROOT / "setup.py"]
    files += [p for s in ("*.cpp", "*.h", "*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(s)]
    long = {
        _name(path): lines
        for path in files
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def test_only_the_bindings_know_pybind11() -> None:
    sources = [p for s in ("*.cpp", "*.h", "*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(s)]
    knowing = {_name(path) for path in sources if "pybind11" in path.read_text(encoding="utf-8")}
    assert "csrc/bindings.cpp" in knowing
    assert all(name.startswith(("csrc/bindings.cpp", "csrc/bindings/")) for name in knowing)
