#!/usr/bin/env bash
# Complete installations with pip, one virtual environment each; minutes, so not part of the suite.
#
#   tests/install_matrix.sh [case ...]        cases: isolated editable cpu off nocompiler sdist
#
# PYTHON (default python3) makes the environments, which share its site-packages only where the case
# says so; torch comes from the package index that pip is configured for. MATRIX_TORCH_FROM names a
# directory of site-packages to borrow torch from instead of installing it six times.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

checkout() {  # a copy of the committed files: nothing built, nothing ignored
    mkdir -p "$1"
    git -C "$root" archive HEAD | tar -x -C "$1"
}

environment() {
    "$python" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --upgrade pip
    if [ -n "${MATRIX_TORCH_FROM:-}" ]; then
        "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            | xargs -I{} sh -c "echo '$MATRIX_TORCH_FROM' > {}/borrowed.pth"
    else
        "$1/bin/python" -m pip install --quiet torch
    fi
}

probe() {  # environment, expected implementation: import from elsewhere than the checkout
    (cd / && "$1/bin/python" - "$2" <<'PY'
import sys
import torch
from rlhf_fast_kernels import dispatch, native
rows = dispatch.selftest()
bad = [row for row in rows if not row.ok]
chosen = dispatch.choose("gae", None, torch.zeros(1)).impl
print(native.__file__, native.describe(), f"{len(rows)} self-tests")
assert not bad, bad
assert chosen == sys.argv[1], (chosen, sys.argv[1], native.build_report())
PY
    )
}

install() {  # case name, expected implementation, pip arguments...
    local name=$1 expected=$2
    shift 2
    echo "== $name"
    checkout "$work/$name/src"
    environment "$work/$name/venv"
    (cd "$work/$name/src" && "$work/$name/venv/bin/python" -m pip install --quiet --no-deps "$@")
    probe "$work/$name/venv" "$expected"
}

case_isolated() { RLHF_FAST_BUILD=auto install isolated cpu .; }
case_editable() { install editable cpu -e .; }
case_cpu() { RLHF_FAST_BUILD=cpu install cpu cpu .; }
case_off() { RLHF_FAST_BUILD=off install off reference -e .; }
case_nocompiler() {  # pip, git-free, with nothing else on PATH; CXX and CUDACXX unset
    mkdir -p "$work/bin"
    (unset CXX CUDACXX CUDA_HOME
     checkout "$work/nocompiler/src"
     environment "$work/nocompiler/venv"
     cd "$work/nocompiler/src"
     PATH="$work/bin" "$work/nocompiler/venv/bin/python" -m pip install --quiet --no-deps .
     probe "$work/nocompiler/venv" reference)
}
case_sdist() {
    echo "== sdist"
    checkout "$work/sdist/src"
    environment "$work/sdist/venv"
    "$work/sdist/venv/bin/python" -m pip install --quiet "setuptools>=77"
    (cd "$work/sdist/src" && "$work/sdist/venv/bin/python" -c '
from setuptools import build_meta
print(build_meta.build_sdist("dist"))') | tail -1
    (cd / && "$work/sdist/venv/bin/python" -m pip install --quiet --no-deps "$work"/sdist/src/dist/*.tar.gz)
    probe "$work/sdist/venv" cpu
}

cases=("$@")
[ ${#cases[@]} -gt 0 ] || cases=(isolated editable cpu off nocompiler sdist)
for name in "${cases[@]}"; do
    "case_$name"
done
echo "all of: ${cases[*]}"
