"""The compiled module: absent, foreign, broken, stale; instruction sets; threads and forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from rlhf_fast_kernels import native

PACKAGE = Path(native.__file__).parent
BUILT = native.missing() is None
needs_core = pytest.mark.skipif(not BUILT, reason="no compiled module on this machine")

USE = """
import torch
from rlhf_fast_kernels import gae, native, dispatch
x = torch.ones(2, 3)
gae(x, x, x.bool(), gamma=1.0, gae_lambda=1.0)
print(native.missing("gae"), "|", dispatch.choose("gae", None, x).impl, "|", native.describe())
"""


def run(code: str, path: Path, **environment: str) -> str:
    # -S keeps the hooks of an editable install out, which would find the real compiled module.
    paths = os.pathsep.join(
        [str(path), *(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))]
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def copy(tmp_path):
    """The Python files of the package without the compiled module."""
    package = tmp_path / "rlhf_fast_kernels"
    package.mkdir()
    for source in PACKAGE.rglob("*.py"):
        target = package / source.relative_to(PACKAGE)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    return package


def test_nothing_compiled_is_a_reason(copy):
    assert "no compiled module was built | reference" in run(USE, copy.parent)


def test_the_reason_of_the_build_is_told(copy):
    (copy / "build_report.json").write_text(json.dumps({"core_reason": "no C++ compiler found"}))
    assert "no C++ compiler found | reference" in run(USE, copy.parent)


def test_a_damaged_report_is_ignored(copy):
    (copy / "build_report.json").write_text("{")
    assert "no compiled module was built | reference" in run(USE, copy.parent)


def test_a_module_of_another_python_is_a_reason(copy):
    (copy / "_core.cpython-399-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    told = run(USE, copy.parent)
    assert "the compiled module is for another Python: _core.cpython-399" in told
    assert "| reference |" in told


def test_a_broken_module_is_a_reason(copy):
    (copy / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    told = run(USE, copy.parent)
    assert "the compiled module does not load" in told
    assert "| reference |" in told


def test_a_stale_module_is_a_reason(copy):
    (copy / "_core.py").write_text(
        "def build_info(): return {'compiler': 'x', 'cuda': None}\n"
        "def cpu_features(): return 'baseline'\n"
    )
    told = run(USE, copy.parent)
    assert "older than the sources: it lacks gae | reference" in told


def test_it_imports_without_triton(copy):
    code = "import sys; sys.modules['triton'] = None\n" + USE
    assert "| reference |" in run(code, copy.parent)


def test_the_module_is_there_where_it_was_asked_for():
    """CI sets RLHF_FAST_EXPECT_CORE, so that a build that fell back does not pass unseen."""
    wanted = os.environ.get("RLHF_FAST_EXPECT_CORE") == "1"
    assert BUILT or not wanted, native.missing()


def test_core_raises_its_reason(monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_load_reason", "no C++ compiler found")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        native.core()
    assert native.describe()["core"] == "no (no C++ compiler found)"


@needs_core
def test_build_info_and_probes_never_raise():
    info = native.core().build_info()
    assert info["compiler"]
    assert native.core().cpu_features().split()[0] in {"baseline", "avx2", "avx512"}
    assert native.core().cuda_status()
    reason = native.core().cuda_unusable_reason(0)
    assert (reason == "") == (torch.cuda.is_available() and info["cuda"] is not None)


ISA = """
import torch
from rlhf_fast_kernels import dispatch, native
print(native.core().cpu_features().split()[0])
for row in dispatch.selftest():
    assert row.ok, row
"""


@needs_core
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_passes_the_selftest(isa):
    if isa not in native.core().cpu_features():
        assert run(ISA, PACKAGE.parent, RLHF_FAST_ISA=isa).strip() != isa
        return
    assert run(ISA, PACKAGE.parent, RLHF_FAST_ISA=isa).strip() == isa


FORK = """
import os, torch
from rlhf_fast_kernels import whiten
torch.set_num_threads(3)
x = torch.randn(500, 1000)
before = whiten(x, None, impl="cpu")
child = os.fork()
if child == 0:
    after = whiten(x, None, impl="cpu")
    torch.set_num_threads(1)  # PyTorch's own team does not survive
    os._exit(0 if torch.equal(before, after) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), torch.equal(before, whiten(x, None, impl="cpu")))
"""


@needs_core
def test_threads_survive_a_fork():
    assert run(FORK, PACKAGE.parent).strip() == "0 True"


FORK_BEFORE_THE_FIRST_OP = """
import os, signal, torch
from rlhf_fast_kernels import whiten
torch.set_num_threads(3)
x = torch.randn(500, 1000)
(x @ x.t()).exp().sum()  # PyTorch's team has started; nothing of ours has run
child = os.fork()
if child == 0:
    signal.alarm(20)
    whiten(x, None, impl="cpu")
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@needs_core
def test_a_child_forked_before_the_first_op_does_not_wait_for_threads_it_has_not():
    assert run(FORK_BEFORE_THE_FIRST_OP, PACKAGE.parent).strip() == "0"


CONCURRENT = """
import threading, torch
from rlhf_fast_kernels import whiten
torch.set_num_threads(4)
x = torch.randn(300, 1000)
expected = whiten(x, None, impl="cpu")
wrong = []
def work():
    for _ in range(30):
        if not torch.equal(whiten(x, None, impl="cpu"), expected):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(wrong))
"""


@needs_core
def test_concurrent_callers_agree():
    assert run(CONCURRENT, PACKAGE.parent).strip() == "0"
