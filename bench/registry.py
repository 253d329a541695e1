"""Every benchmark by name and group, and the arguments that each preset gives to it.

A bench is a module of this package with `main(arguments)` that takes `--json FILE`. One that a
version does not have is left out and named, so that nobody takes its silence for a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROUPS = ("kernels", "generate", "step", "memory", "learning", "distributed", "complexity")


@dataclass(frozen=True)
class Preset:
    """A machine and an amount of work."""

    device: str
    about: str
    environment: Mapping[str, str] = field(default_factory=dict)


NO_COMPILER = {"BENCH_COMPILE": "off"}
PRESETS = {
    "tiny": Preset("cpu", "every bench at its smallest; no figure means anything", NO_COMPILER),
    "quick": Preset("cpu", "few turns and cases"),
    "cpu": Preset("cpu", "everything on the CPU"),
    "h200": Preset("cuda", "everything that one GPU can run, at the shapes of an H200"),
}


@dataclass(frozen=True)
class Bench:
    """One script.

    Attributes:
        name: of its report, without `.json`.
        group: one of `GROUPS`.
        module: below this package.
        arguments: by preset; it has no part in a preset that is missing here.
        limit: seconds that it may take.
        threads: it takes `--threads`.
        ranks: processes under torchrun; 0: it is started as it is.
        trl: it takes `--trl-python`.
    """

    name: str
    group: str
    module: str
    arguments: Mapping[str, Sequence[str]]
    limit: float = 900.0
    threads: bool = True
    ranks: int = 0
    trl: bool = False

    def command(self, preset: str, package: str) -> list[str]:
        """Arguments of the interpreter that run it in a preset; `package` is the name of ours."""
        start = ["-m", f"{package}.{self.module}", *self.arguments[preset]]
        if not self.ranks:
            return start
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node", str(self.ranks), *start]

    @property
    def present(self) -> bool:
        """Whether this version has it."""
        return (HERE / Path(*self.module.split("."))).with_suffix(".py").is_file()


def _kernel(name: str, tiny: str, *, gpu: bool = True) -> Bench:
    smallest = (*tiny.split(), "--repeats", "1")
    arguments: dict[str, Sequence[str]] = {"tiny": smallest, "quick": ("--quick",), "cpu": ()}
    if gpu:
        arguments["h200"] = ("--device", "cuda")
    # Peers are compiled for every case, which takes long beside other work.
    return Bench(name, "kernels", f"kernels.bench_{name}", arguments, limit=1800.0)


def _step(name: str, group: str, limit: float, *, trl: bool = True) -> Bench:
    presets = {"tiny": "tiny", "quick": "tiny", "cpu": "cpu"}
    arguments = {key: ("--preset", value) for key, value in presets.items()}
    return Bench(name, group, f"ppo.bench_{name}", arguments, limit, trl=trl)


GENERATE = {
    "tiny": "--shapes tiny --batches 1,2 --prompt 3 --new-tokens 4 --longest 8 --rounds 2"
    " --peers generate",
    "quick": "--shapes small --batches 1,16 --rounds 2 --peers generate",
    "cpu": "--peers generate",
    "h200": "--device cuda --dtype bf16 --shapes 1b,8b --batches 1,64,256 --lengths uniform"
    " --prompt 512 --new-tokens 128 --rounds 3 --peers generate,vllm",
}
RANKS = {
    "tiny": "--ranks 2 --views gather --hidden 32 --layers 2 --vocab 64 --new-tokens 4"
    " --prompts 4 --steps 1",
    "quick": "--ranks 1,2 --views tp,gather --steps 2",
    "cpu": "--ranks 1,2,4",
}
HEAD = {
    "tiny": "--tokens 8 --hidden 16 --vocab 64 --repeats 1",
    "quick": "--tokens 256 --hidden 256 --vocab 8000 --repeats 3",
    "cpu": "",
}
COMPLEXITY = {"tiny": "--preset tiny", "quick": "--preset quick", "cpu": "--preset cpu"}


def _words(lines: Mapping[str, str]) -> dict[str, Sequence[str]]:
    return {preset: line.split() for preset, line in lines.items()}


#: The most important first within a group.
BENCHES = (
    _kernel("logprobs", "--shape 16x300 --dtype fp32"),
    _kernel("linear_logprobs", "--shape 16x32x300 --dtype fp32"),
    _kernel("linear_ppo_loss", "--shape 16x32x300 --dtype fp32"),
    _kernel("gae", "--case gae fused whiten --rows 4 --columns 32"),
    _kernel("ppo_loss", "--tokens 64 --dtype fp32"),
    _kernel("sample", "--shape 4x300 --dtype fp32"),
    _kernel("packed_attention", "--case 3x10x2x1x16 --dtype fp32"),
    _kernel("paged_attention", "--case decode:2x2x1x16x20 --page 16 --dtype fp32"),
    _kernel("rope_and_store", "--shape 8x2x1x16 --dtype fp32"),
    _kernel("kl", "--shape 16x300 --dtype fp32"),
    _kernel("decoder_ops", "--shape 4x64 --dtype fp32"),
    _kernel("linear_small", "--shape 32x48 --rows 4", gpu=False),
    _kernel("matmul", "--shape 18x32x48", gpu=False),
    _kernel("decoder_layer", "--case 2x6x16x24x2x1", gpu=False),
    Bench("generate", "generate", "engine.bench_generate", _words(GENERATE), 3000.0),
    _step("step", "step", 3000.0),
    _step("memory", "memory", 1800.0, trl=False),
    _step("learning", "learning", 7200.0),
    Bench("distributed_step", "distributed", "distributed.bench_step", _words(RANKS), 900.0),
    Bench(
        *("vocab_parallel", "distributed", "distributed.bench_vocab_parallel", _words(HEAD)),
        ranks=2,
    ),
    Bench("complexity", "complexity", "complexity.bench_complexity", _words(COMPLEXITY), 1800.0),
)


def chosen(group: str, names: Sequence[str] = ()) -> list[Bench]:
    """The benches of a group (`all` for all), or those named among them."""
    found = [bench for bench in BENCHES if group in ("all", bench.group)]
    return [bench for bench in found if not names or bench.name in names]
