"""The correctness pieces of `gpu_suite`: what must hold on a device before its speed means much."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.engine.decode_graphs import CudaRecorder
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.models.adapters import SharedTrunk
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels import dispatch, paged_attention
from rlhf_fast_kernels.attention_backends import NAMES, AttentionChoice, Decoding, choose_attention

from .bench_generate import Shape

SHAPE = Shape(512, 256, 512, 2, 4, 2)
# Mean |log-prob - teacher forcing| in fp32; in bf16 the modules' own gap is the measure.
FP32_GAP = 1e-4


class RepeatingRecorder:
    """In the place of a GPU's recorder on a CPU: a replay runs the step."""

    pool_bytes = 0

    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        """See `rlhf_fast.engine.decode_graphs.Recorder`."""
        return body


class NoRecorder:
    """Steps run as they are, at the width of their graphs."""

    pool_bytes = 0

    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        """Refuse."""
        raise RuntimeError("not recorded, to compare")


def ops(device: torch.device) -> dict[str, Any]:
    """Parity of every implementation with its reference."""
    rows = [row._asdict() for row in dispatch.selftest() if row.device == device.type]
    return {"passed": bool(rows) and all(row["ok"] for row in rows), "rows": rows}


def requests(temperature: float = 1.0) -> list[Request]:
    """Ragged prompts; settings of two kinds."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(8):
        size = int(torch.randint(1, 20, (1,), generator=generator))
        prompt = torch.randint(3, SHAPE.vocab, (size,), generator=generator).tolist()
        top_k = 0 if index % 3 else 20
        sampling = SamplingParams(4 + 2 * index, temperature=temperature, top_k=top_k)
        found.append(Request(tuple(prompt), sampling, (2 * index, 2 * index + 1)))
    return found


def gap_to_teacher(model: Any, work: Sequence[Request], out: Completions) -> float:
    """Mean |raw log-prob - that of one forward of the whole sequence|, in the model's own type."""
    gaps, sample = [], 0
    for request in work:
        for _ in request.seeds:
            n = int(out.lengths[sample])
            drawn = out.tokens[sample, :n]
            ids = torch.cat([torch.tensor(request.prompt, device=drawn.device), drawn])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, -n - 1 : -1].float()
            table = (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)
            teacher = table.gather(-1, drawn[:, None])[:, 0]
            gaps.append((teacher - out.raw_logprobs[sample, :n]).abs())
            sample += 1
    return float(torch.cat(gaps).mean())


def paths(device: torch.device) -> dict[str, Any]:
    """Fused forward and modules against teacher forcing in fp32, and against each other in bf16."""
    rows = []
    for compute in ("float32", "bfloat16"):
        for adapted in (False, True):
            truth = SHAPE.build(device, torch.float32)
            model = SHAPE.build(device, torch.float32)
            if adapted:
                _adapt(truth)
                _adapt(model)
            set_compute_dtype(model, compute)  # type: ignore[arg-type]
            gaps = {}
            for path in ("fused", "modules"):
                engine = HybridEngine(model, eos_ids=(), settings=EngineSettings(path=path))
                gaps[path] = gap_to_teacher(truth, requests(), engine.complete(requests()))
            allowed = FP32_GAP if compute == "float32" else 1.5 * gaps["modules"] + 2e-3
            rows.append(
                {"compute": compute, "lora": adapted, **gaps, "passed": gaps["fused"] <= allowed}
            )
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


def _adapt(model: Any) -> None:
    """An active adapter that says something."""
    trunk = SharedTrunk(model)
    trunk.add("actor", trunk.shape(4, 8.0, ["all-linear"]), seed=0, trainable=True)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in trunk.tensors("actor").items():
        if name.endswith("lora_B.weight"):
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    trunk._select("actor")


def graphs(device: torch.device) -> dict[str, Any]:
    """Replayed steps against the same steps as they are: bits; against unpadded ones: tokens."""
    rows = []
    for path in ("fused", "modules"):
        for compute in ("float32", "bfloat16"):
            model = SHAPE.build(device, torch.float32)
            set_compute_dtype(model, compute)  # type: ignore[arg-type]
            found, report = {}, None
            for kind in ("replayed", "padded", "plain"):
                settings = EngineSettings(path=path, max_batch=9, burst=4, cuda_graphs=False)
                engine = HybridEngine(model, eos_ids=(), settings=settings)
                assert engine._runner is not None
                if kind == "replayed":
                    on_gpu = device.type == "cuda"
                    engine._runner.recorder = (
                        (lambda: CudaRecorder(device)) if on_gpu else RepeatingRecorder
                    )
                elif kind == "padded":
                    engine._runner.recorder = NoRecorder
                found[kind] = engine.complete(requests())
                report = engine.graphs if kind == "replayed" else report
            assert report is not None
            same = all(
                torch.equal(getattr(found["replayed"], name), getattr(found["padded"], name))
                for name in ("tokens", "logprobs", "lengths")
            )
            agree = (found["replayed"].tokens == found["plain"].tokens).float().mean()
            rows.append(
                {
                    "path": path,
                    "compute": compute,
                    "same_bits": same,
                    "tokens_as_unpadded": float(agree),
                    "graphs": report._asdict(),
                    # The modules of transformers may hold what no graph can: then they say so.
                    "passed": same and (path == "modules" or report.reason is None),
                }
            )
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


def attention(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Each backend that decodes here against `paged_attention`."""
    rows, heads, kv_heads, width, size = (8, 4, 2, 16, 256) if tiny else (64, 32, 8, 128, 256)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    pages = 1 + rows * (1 if tiny else 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    keys, values = (normal(pages, kv_heads, size, width).transpose(1, 2) for _ in range(2))
    q, out = normal(rows, heads, width), normal(rows, heads, width)
    table = torch.arange(1, pages, dtype=torch.int32, device=device).view(rows, -1)
    longest = table.shape[1] * size
    contexts = torch.linspace(1, longest, rows, device=device).to(torch.int32)
    truth = paged_attention(q, keys, values, table, contexts, impl="reference").float()

    def measured(choice: AttentionChoice) -> dict[str, Any]:
        call = Decoding(table, contexts, width**-0.5, None, longest)
        run = choice.decode.decoding(q, keys, values, out, call)
        run(q, keys, values, out)
        error = float((out.float() - truth).abs().max())
        repeats = 2 if tiny else 200
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run(q, keys, values, out)
        _wait(device)
        seconds = (time.perf_counter() - start) / repeats
        read = 2 * int(contexts.sum()) * kv_heads * width * dtype.itemsize
        return {
            "max_error": error,
            "microseconds": seconds * 1e6,
            "gb_per_s": read / seconds / 1e9,
            "passed": error < (1e-4 if dtype == torch.float32 else 2e-2),
        }

    found: dict[str, Any] = {}
    for name in NAMES:
        try:
            choice = choose_attention(device, dtype, width, size, wish=name)
        except ValueError as error:
            found[name] = {"absent": str(error)}
            continue
        try:
            found[name] = measured(choice)
        except Exception as error:  # a library that does not run takes no other along
            traceback.print_exc()
            found[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    return {"passed": all(row.get("passed", True) for row in found.values()), "backends": found}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
