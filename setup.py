"""Builds the wheel; compiles `rlhf_fast_kernels._core` when the machine can.

A missing or failing compiler never fails the installation: without the CUDA part the module is
built for CPUs, without the CPU part the wheel is pure Python and the ops run on PyTorch. What was
built and why the rest was not is written to `rlhf_fast_kernels/build_report.json`; `rlhf-fast env`
prints it.
Nothing here imports torch, looks for a GPU or downloads anything.

Environment:
    RLHF_FAST_BUILD       auto (default); require: failing is fatal; cpu: no CUDA; off: pure Python
    RLHF_FAST_CUDA_ARCHS  CUDA architectures, e.g. "80;90"; default: those of DEFAULT_CUDA_ARCHS
                          that the toolkit knows, and PTX of the newest
    CXX, CUDACXX, CUDA_HOME   compilers to use, before PATH and /usr/local/cuda*
    MAX_JOBS              parallel compile jobs; default: cores, with 2 GB of memory for each
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "rlhf_fast_kernels._core"
BENCH = "rlhf_fast_bench"
REPORT_NAME = "build_report.json"
BUILD_MODES = ("auto", "require", "cpu", "off")
DEFAULT_CUDA_ARCHS = ("80", "90", "100", "120")
BYTES_PER_JOB = 2 << 30
# A crawling compiler must not hang an installation for ever.
STEP_TIMEOUT_S = 1800


class BuildProblem(Exception):
    """Why a part cannot be built; goes into the report."""


@dataclass
class Report:
    """Contents of build_report.json."""

    mode: str
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=sysconfig.get_platform)
    core: bool = False
    core_reason: str = ""
    cuda: bool = False
    cuda_reason: str = ""
    cxx: str = ""
    cmake: str = ""
    nvcc: str = ""
    cuda_archs: str = ""

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / REPORT_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def build_mode() -> str:
    mode = os.environ.get("RLHF_FAST_BUILD", "auto").strip().lower() or "auto"
    if mode not in BUILD_MODES:
        raise SystemExit(f"RLHF_FAST_BUILD={mode!r}: expected one of {', '.join(BUILD_MODES)}")
    return mode


def first_line(command: list[str]) -> str:
    """First line of a tool's version text; BuildProblem if the tool does not run."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildProblem(f"{command[0]} does not run: {error}") from error
    return (result.stdout.strip() or result.stderr.strip()).split("\n")[0]


def find_program(names: tuple[str, ...], what: str) -> str:
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildProblem(f"no {what} found (looked for {', '.join(n for n in names if n)} on PATH)")


def bundled_program(package: str, name: str) -> str:
    """A build requirement's own program, for environments whose scripts are not on PATH."""
    try:
        module = __import__(package)
    except ImportError:
        return ""
    directory = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    candidate = Path(directory) / name if directory else None
    return str(candidate) if candidate and candidate.exists() else ""


def find_nvcc() -> str:
    candidates = [os.environ.get("CUDACXX", "")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates.append("nvcc")
    newest_first = sorted(glob.glob("/usr/local/cuda*/bin/nvcc"), key=version_key, reverse=True)
    for candidate in [*candidates, *newest_first]:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise BuildProblem("no nvcc found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda*)")


def version_key(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def cuda_architectures(nvcc: str) -> str:
    """CMake's architecture list, e.g. "80-real;90-real;90-virtual"."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=False
    )
    known = set(re.findall(r"sm_(\d+)", listed.stdout))
    wanted_text = os.environ.get("RLHF_FAST_CUDA_ARCHS", "")
    wanted = re.findall(r"\d+[a-z]?", wanted_text.replace(".", "")) or list(DEFAULT_CUDA_ARCHS)
    archs = [arch for arch in wanted if not known or re.sub(r"\D", "", arch) in known]
    if not archs:
        raise BuildProblem(f"nvcc knows none of the architectures {', '.join(wanted)}")
    newest = max(archs, key=lambda arch: int(re.sub(r"\D", "", arch)))
    return ";".join([*(f"{arch}-real" for arch in archs), f"{newest}-virtual"])


def job_count() -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return cores
    return max(1, min(cores, available // BYTES_PER_JOB))


@dataclass
class Toolchain:
    """What every build needs; found once."""

    cxx: str
    cmake: str
    ninja: str
    python_include: str
    pybind11_include: str

    @classmethod
    def find(cls, report: Report) -> Toolchain:
        if sys.platform == "win32":
            raise BuildProblem("the compiled module is not built on Windows")
        names = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
        cxx = find_program(names, "C++ compiler")
        report.cxx = f"{cxx}: {first_line([cxx, '--version'])}"
        cmake = find_program(("cmake", bundled_program("cmake", "cmake")), "cmake")
        report.cmake = f"{cmake}: {first_line([cmake, '--version'])}"
        ninja = find_program(("ninja", "ninja-build", bundled_program("ninja", "ninja")), "ninja")
        include = sysconfig.get_paths()["include"]
        if not (Path(include) / "Python.h").exists():
            raise BuildProblem(
                f"Python.h is not in {include} (on Debian and Ubuntu: apt install python3-dev)"
            )
        try:
            import pybind11
        except ImportError as error:
            raise BuildProblem(f"pybind11 cannot be imported: {error}") from error
        return cls(cxx, cmake, ninja, include, pybind11.get_include())


class CoreBuilder:
    """Runs cmake and ninja for one output directory."""

    def __init__(self, tools: Toolchain, build_dir: Path, output_dir: Path) -> None:
        self.tools = tools
        self.build_dir = build_dir
        self.output_dir = output_dir

    def build(self, cuda_options: list[str]) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        directory = self.build_dir / ("cuda" if cuda_options else "cpu")
        configure = [
            *(self.tools.cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={self.tools.ninja}",
            f"-DCMAKE_CXX_COMPILER={self.tools.cxx}",
            f"-DRLHF_FAST_PYTHON_INCLUDE={self.tools.python_include}",
            f"-DRLHF_FAST_PYBIND11_INCLUDE={self.tools.pybind11_include}",
            f"-DRLHF_FAST_EXT_SUFFIX={suffix}",
            f"-DRLHF_FAST_OUTPUT_DIR={self.output_dir}",
            *cuda_options,
        ]
        if not self.step(configure):
            # A cache of another machine or compiler: once more from nothing.
            shutil.rmtree(directory, ignore_errors=True)
            self.step(configure, must=True)
        jobs = str(job_count())
        self.step([self.tools.cmake, "--build", str(directory), "--parallel", jobs], must=True)
        self.check_loads(self.output_dir / f"_core{suffix}")

    @staticmethod
    def check_loads(module: Path) -> None:
        code = (
            "import importlib.util as u, sys; s = u.spec_from_file_location('_core', sys.argv[1]); "
            "m = u.module_from_spec(s); s.loader.exec_module(m); m.build_info()"
        )
        CoreBuilder.step([sys.executable, "-c", code, str(module)], must=True)

    @staticmethod
    def step(command: list[str], must: bool = False) -> bool:
        print("+", " ".join(command), flush=True)
        try:
            result = subprocess.run(
                *(command,),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=STEP_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildProblem(f"{command[0]}: {error}") from error
        print(result.stdout, flush=True)
        if result.returncode == 0:
            return True
        if must:
            raise BuildProblem(f"{Path(command[0]).name} failed: {telling_lines(result.stdout)}")
        return False


def telling_lines(log: str) -> str:
    """The lines of a build log that say what went wrong, for a one-line reason."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error|not found", line)]
    return " | ".join((errors or lines)[-4:])[-600:]


class BuildCore(build_ext):
    """`build_ext` for the one extension: CUDA, else CPU only, else nothing, with a report."""

    def build_extension(self, ext: Extension) -> None:
        report = Report(mode=build_mode())
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            if report.mode == "off":
                raise BuildProblem("RLHF_FAST_BUILD=off")
            self.build_core(report, target.parent)
        except BuildProblem as problem:
            report.core_reason = str(problem)
            report.cuda_reason = report.cuda_reason or str(problem)
            if report.mode == "require":
                raise SystemExit(f"RLHF_FAST_BUILD=require: {problem}") from problem
            print(f"warning: {MODULE} is not built: {problem}", file=sys.stderr)
        report.write(target.parent)
        self.report = report
        if self.source_wanted:
            source = ROOT / "kernels" / "rlhf_fast_kernels"
            report.write(source)
            if not report.core:
                (source / target.name).unlink(missing_ok=True)

    source_wanted = False

    def run(self) -> None:
        # setuptools clears `inplace` while it builds and copies the module afterwards.
        self.source_wanted = bool(self.inplace)
        super().run()

    def build_core(self, report: Report, output_dir: Path) -> None:
        tools = Toolchain.find(report)
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        builder = CoreBuilder(tools, ROOT / "build" / f"core-{tag}", output_dir)
        try:
            cuda_options = self.cuda_options(report)
            builder.build(cuda_options)
            report.core = report.cuda = True
            return
        except BuildProblem as problem:
            report.cuda_reason = str(problem)
            report.cuda_archs = ""
            if report.mode == "require" and report.nvcc:
                raise
            print(f"warning: building without CUDA: {problem}", file=sys.stderr)
        builder.build([])
        report.core = True

    @staticmethod
    def cuda_options(report: Report) -> list[str]:
        if report.mode == "cpu":
            raise BuildProblem("RLHF_FAST_BUILD=cpu")
        nvcc = find_nvcc()
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release [\d.]+, V([\d.]+)", version.stdout)
        report.nvcc = f"{nvcc}: {release.group(1) if release else 'unknown version'}"
        report.cuda_archs = cuda_architectures(nvcc)
        return [
            "-DRLHF_FAST_WITH_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DRLHF_FAST_CUDA_ARCHS={report.cuda_archs}",
        ]


class Wheel(bdist_wheel):
    """Tags the wheel after the build: platform-specific with a compiled module, `any` without."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").report.core:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def packages() -> list[str]:
    """All packages of the wheel; `bench` is no name to install, so there it has another."""
    bench = [f"{BENCH}.{name}" for name in find_packages("bench")]
    ours = find_packages(include=["rlhf_fast", "rlhf_fast.*"])
    return [*ours, *find_packages("kernels"), BENCH, *bench]


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"rlhf_fast_kernels": "kernels/rlhf_fast_kernels", BENCH: "bench"},
        package_data={"*": ["py.typed", "*.json", "*.jinja", "*.html", "*.css", "*.js", "*.yaml"]},
        exclude_package_data={"rlhf_fast_kernels": [REPORT_NAME]},
        ext_modules=[Extension(MODULE, sources=[], optional=True)],
        cmdclass={"build_ext": BuildCore, "bdist_wheel": Wheel},
    )
