"""Registers, shared memory and spills of every Triton kernel, compiled without a GPU.

    python -m bench.kernels.triton_resources [--arch 80 90 100] [--op logprobs_from_logits ...]
                                             [--few] [--json FILE]

Exits with 1 if a kernel does not compile, or if one that is marked hot spills registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_fast_kernels import triton_support
from rlhf_fast_kernels.triton_support import AotCase

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture; `problem` is empty if all is well."""

    op: str
    kernel: str
    case: str
    arch: int
    registers: int = 0
    shared_bytes: int = 0
    local_bytes: int = 0  # of the stack: spilled registers
    hot: bool = True
    problem: str = ""


def inspect(op: str, case: AotCase, arch: int) -> Resources:
    """Compile one case for sm_<arch> and read the resources off the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(case.constants)
    name = case.kernel.__name__
    label = ", ".join(
        [f"{k}={v}" for k, v in constants.items()]
        + sorted({t for t in case.signature.values() if t.startswith("*")})
    )
    signature = {**case.signature, **dict.fromkeys(constants, "constexpr")}
    ordered = {argument: signature[argument] for argument in case.kernel.arg_names}
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(case.kernel.arg_names)
        if argument in case.multiples_of_16
    }
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,
    }
    try:
        source = ASTSource(case.kernel, signature=ordered, constexprs=constants, attrs=multiples)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, local = _usage(built.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is the result
        return Resources(op, name, label, arch, hot=case.hot, problem=str(error)[-400:])
    problem = f"{local} bytes spilled" if local and case.hot else ""
    shared = int(built.metadata.shared)
    return Resources(op, name, label, arch, registers, shared, local, case.hot, problem)


def _usage(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        done = subprocess.run(
            [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no usage: {done.stdout}")
    return int(found[1]), int(found[2]) + int(found[3])


def collect(ops: Sequence[str], architectures: Sequence[int], few: bool) -> list[Resources]:
    """All cases of these ops on these architectures, or a `few` of the pairs, see `few_of`."""
    choose = few_of if few else all_of
    return [
        inspect(op, case, arch)
        for op in ops
        for case, arch in choose(triton_support.kernels(op).AOT_CASES, architectures)
    ]


def all_of(cases: Sequence[AotCase], architectures: Sequence[int]) -> list[tuple[AotCase, int]]:
    """Every case with each architecture that launches it."""
    return [(case, arch) for case in cases for arch in architectures if arch >= case.oldest]


def few_of(cases: Sequence[AotCase], architectures: Sequence[int]) -> list[tuple[AotCase, int]]:
    """A kernel's first case with every architecture, its further cases with one each, in turn."""
    chosen: list[tuple[AotCase, int]] = []
    seen: Counter[str] = Counter()
    for case in cases:
        able = [arch for arch in architectures if arch >= case.oldest]
        turn = seen[case.kernel.__name__]
        chosen += [(case, arch) for arch in (able if not turn else [able[turn % len(able)]])]
        seen[case.kernel.__name__] += 1
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="resources of the Triton kernels")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--op", nargs="+", help="default: all")
    parser.add_argument(
        "--few", action="store_true", help="one case of every kernel on all, the others on one each"
    )
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if not triton_support.installed():
        print("nothing to compile: triton is not installed", file=sys.stderr)
        return 1
    if triton_support.interpreting():
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 1
    ops = options.op or triton_support.ops_with_kernels()
    rows = collect(ops, options.arch, options.few)
    print(f"{'kernel':<44}{'sm':>5}{'registers':>11}{'shared B':>10}{'spilled B':>11}  case")
    for row in rows:
        name = f"{row.op}.{row.kernel}"
        numbers = f"{row.registers:>11}{row.shared_bytes:>10}{row.local_bytes:>11}"
        print(f"{name:<44}{row.arch:>5}{numbers}  {row.case}  {row.problem}")
    if options.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
