"""What an installation does on machines with and without compilers; `tests/install_matrix.sh` goes
through complete installations with pip."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml")


def build_tools_present() -> bool:
    """Whether this environment holds what [build-system] asks for; otherwise pip fetches it."""
    try:
        recent = int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False
    return recent and importlib.util.find_spec("pybind11") is not None


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, without anything built."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("readme\n")
    built = shutil.ignore_patterns("__pycache__", "*.so", "build_report.json")
    for name in ("csrc", "kernels", "rlhf_fast", "bench"):
        shutil.copytree(ROOT / name, root / name, ignore=built)
    (root / "tests").mkdir()
    (root / "tests" / "__init__.py").write_text("")
    return root


def build_wheel(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", "out"]
    if build_tools_present():
        command.append("--no-build-isolation")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CXX", "CUDACXX", "CUDA_HOME", "RLHF_FAST_BUILD", "RLHF_FAST_CUDA_ARCHS"}
    }
    return subprocess.run(
        command,
        cwd=checkout,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def unpack(checkout: Path) -> tuple[str, Path, dict]:
    """(file name of the only wheel, directory with its contents, its build report)."""
    (wheel,) = (checkout / "out").glob("*.whl")
    site = checkout / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    report = json.loads((site / "rlhf_fast_kernels" / "build_report.json").read_text())
    return wheel.name, site, report


USE = """
import torch
from rlhf_fast_kernels import dispatch, gae, native
x = torch.ones(2, 3)
advantages, _ = gae(x, x, x.bool(), gamma=1.0, gae_lambda=1.0)
assert advantages.tolist() == [[2.0, 1.0, 0.0]] * 2
print(dispatch.choose("gae", None, x).impl, native.describe()["core"])
"""


def use(site: Path) -> str:
    installed = (sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    result = subprocess.run(
        [sys.executable, "-S", "-c", USE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *installed])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_compiler_gives_a_pure_wheel_that_works(checkout, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = build_wheel(checkout, PATH=str(empty))
    assert result.returncode == 0, result.stderr
    name, site, report = unpack(checkout)
    assert name.endswith("-py3-none-any.whl")
    assert report["core"] is False
    assert report["core_reason"].startswith("no C++ compiler found")
    assert report["cuda"] is False
    assert use(site).startswith("reference no (no C++ compiler found")
    assert not [path for path in site.rglob("*") if path.suffix == ".so"]
    top_level = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top_level == {"rlhf_fast", "rlhf_fast_kernels", "rlhf_fast_bench"}
    scripts = {path.relative_to(ROOT / "bench") for path in (ROOT / "bench").rglob("*.py")}
    bench = site / "rlhf_fast_bench"
    assert {path.relative_to(bench) for path in bench.rglob("*") if path.is_file()} == scripts
    assert (site / "rlhf_fast_kernels" / "py.typed").exists()


def test_off_builds_nothing(checkout):
    result = build_wheel(checkout, RLHF_FAST_BUILD="off")
    assert result.returncode == 0, result.stderr
    name, _, report = unpack(checkout)
    assert name.endswith("-py3-none-any.whl")
    assert report["core_reason"] == "RLHF_FAST_BUILD=off"


def test_an_unknown_mode_names_the_choices(checkout):
    result = build_wheel(checkout, RLHF_FAST_BUILD="fast")
    assert result.returncode != 0
    assert "expected one of auto, require, cpu, off" in result.stdout + result.stderr


def test_require_makes_a_missing_compiler_fatal(checkout, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = build_wheel(checkout, PATH=str(empty), RLHF_FAST_BUILD="require")
    assert result.returncode != 0
    assert "RLHF_FAST_BUILD=require: no C++ compiler found" in result.stdout + result.stderr


def test_a_compiler_that_fails_gives_a_pure_wheel_with_its_words(checkout, tmp_path):
    broken = script(
        tmp_path / "c++",
        'test "$1" = --version && echo "toy 1.0" && exit 0\necho "error: no licence" && exit 1',
    )
    result = build_wheel(checkout, CXX=str(broken))
    assert result.returncode == 0, result.stderr
    name, _, report = unpack(checkout)
    assert name.endswith("-py3-none-any.whl")
    assert report["cxx"].endswith("toy 1.0")
    assert "failed" in report["core_reason"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    os.environ.get("RLHF_FAST_EXPECT_CORE") != "1"
    and not all(shutil.which(name) for name in ("c++", "cmake", "ninja")),
    reason="no C++ compiler on this machine",
)
def test_a_broken_nvcc_leaves_the_cpu_module(checkout, tmp_path):
    broken = script(
        tmp_path / "nvcc",
        'case "$1" in --version) echo "release 99.9, V99.9.1";; --list-gpu-code) echo sm_90;; '
        '*) echo "error: nvcc is broken"; exit 1;; esac',
    )
    result = build_wheel(checkout, CUDACXX=str(broken))
    assert result.returncode == 0, result.stderr
    name, site, report = unpack(checkout)
    assert report["core"] is True
    assert report["cuda"] is False
    assert report["nvcc"].endswith("99.9.1")
    assert "failed" in report["cuda_reason"]
    assert not name.endswith("-py3-none-any.whl")
    assert use(site).startswith("cpu yes")


# ---- parts of setup.py --------------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch):
    if not build_tools_present():
        # The file imports setuptools >= 77; the wheel tests above exercise it through pip.
        pytest.skip("setuptools >= 77 is not in this environment")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "setup_py", module)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "RLHF_FAST_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_nvcc_is_searched_in_order(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: name if "/" in name else None)
    found = ["/usr/local/cuda-9.2/bin/nvcc", "/usr/local/cuda-13.0/bin/nvcc"]
    monkeypatch.setattr(setup_py.glob, "glob", lambda _pattern: found)
    assert setup_py.find_nvcc() == "/usr/local/cuda-13.0/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert setup_py.find_nvcc() == "/opt/cuda/bin/nvcc"
    monkeypatch.setenv("CUDACXX", "/opt/other/nvcc")
    assert setup_py.find_nvcc() == "/opt/other/nvcc"


def test_a_machine_without_nvcc_says_where_it_looked(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.shutil, "which", lambda _name: None)
    monkeypatch.setattr(setup_py.glob, "glob", lambda _pattern: [])
    with pytest.raises(setup_py.BuildProblem, match="no nvcc found"):
        setup_py.find_nvcc()


@pytest.mark.parametrize(
    ("known", "wanted", "expected"),
    [
        ("sm_80 sm_90 sm_100 sm_120", "", "80-real;90-real;100-real;120-real;120-virtual"),
        ("sm_70 sm_80 sm_90", "", "80-real;90-real;90-virtual"),
        ("sm_80 sm_90", "9.0", "90-real;90-virtual"),
        ("sm_80 sm_90", "80;90a", "80-real;90a-real;90a-virtual"),
    ],
)
def test_architectures_are_named_and_filtered(
    setup_py, monkeypatch, tmp_path, known, wanted, expected
):
    nvcc = script(tmp_path / "nvcc", f"for a in {known}; do echo $a; done")
    monkeypatch.setenv("RLHF_FAST_CUDA_ARCHS", wanted)
    assert setup_py.cuda_architectures(str(nvcc)) == expected


def test_a_toolkit_without_any_of_them_is_a_problem(setup_py, tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo sm_52")
    with pytest.raises(setup_py.BuildProblem, match="none of the architectures 80, 90, 100, 120"):
        setup_py.cuda_architectures(str(nvcc))


def test_jobs_fit_the_memory_and_obey_the_user(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.os, "sched_getaffinity", lambda _pid: set(range(64)))
    pages = {"SC_AVPHYS_PAGES": (7 << 30) // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(setup_py.os, "sysconf", pages.__getitem__)
    assert setup_py.job_count() == 3
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py.job_count() == 7


def test_the_build_needs_no_torch():
    import tomllib

    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in requires if name.startswith("torch")]
    code = (ROOT / "setup.py").read_text()
    assert "import torch" not in code
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "#include <torch" not in text, path
        assert "#include <ATen" not in text, path


def test_versions_that_other_trainers_pin_are_not_excluded():
    """pip must find one transformers for them and for us; their tests run under the same ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    pinned = re.findall(r"transformers==([\d.]+)", (ROOT / "Makefile").read_text())
    assert len(pinned) == 2  # verl's and OpenRLHF's
    assert all(ours["transformers"].contains(v) for v in pinned)
    assert ours["torch"].contains("2.11.0")  # verl's, with vLLM, SGLang or FSDP
