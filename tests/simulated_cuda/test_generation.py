"""The engine on a device: the tokens of the CPU, whatever path, attention and graphs it takes."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels import attention_backends, dispatch
from tests.engine.test_generator import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "simulated_cuda" not in sys.modules, reason="needs a device with the host's arithmetic"
    ),
]

PLAIN = "tests.simulated_cuda.attention"
REQUESTS = [
    Request((5, 6, 7), SamplingParams(9, temperature=1.0), (1, 2)),
    Request((9,), SamplingParams(6, temperature=0.0), (3,)),
    Request(tuple(range(3, 20)), SamplingParams(12, temperature=0.7, top_p=0.9, top_k=9), (7, 8)),
]


@pytest.fixture(autouse=True)
def libraries_are_looked_for_again() -> Iterator[None]:
    yield
    attention_backends._imported.cache_clear()


def drawn(module: nn.Module, **settings: Any) -> tuple[Completions, HybridEngine]:
    chosen = EngineSettings(**{"max_batch": 4, "poison": True, **settings})
    engine = HybridEngine(module, eos_ids=[2], settings=chosen)
    return engine.complete(REQUESTS), engine


def graphs_of(engine: HybridEngine) -> Any:
    return engine._runner.last_graphs  # type: ignore[union-attr]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("path", ["fused", "modules"])
def test_tokens_are_the_hosts(path: str, graphs: bool) -> None:
    module = build("llama")
    want, _ = drawn(module, path=path)
    found, engine = drawn(module.cuda(), path=path, cuda_graphs=graphs)
    assert found.tokens.is_cuda
    assert torch.equal(found.tokens.cpu(), want.tokens)
    torch.testing.assert_close(found.logprobs.cpu(), want.logprobs, rtol=0, atol=1e-5)
    assert graphs_of(engine).replays == 0  # the reference waits for the device: not capturable


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "modules"])
def test_replays_of_graphs_with_our_kernels_draw_the_same(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build("llama")
    want, _ = drawn(module, path=path)
    with_kernels = [op for op in dispatch.ops() if "triton" in dispatch._ops[op].implementations]
    monkeypatch.setenv(dispatch.ENVIRONMENT, ",".join(f"{op}=triton" for op in with_kernels))
    found, engine = drawn(module.cuda(), path=path)
    assert torch.equal(found.tokens.cpu(), want.tokens)
    torch.testing.assert_close(found.logprobs.cpu(), want.logprobs, rtol=0, atol=1e-5)
    report = graphs_of(engine)
    assert report.reason is None
    assert report.recorded > 0
    assert report.replays > 0


@pytest.mark.parametrize("name", ["llama", "mistral"])  # mistral: a sliding window
@pytest.mark.parametrize("attention", ["rlhf_fast", "flash_attn", "torch_varlen"])
def test_every_attention_gives_the_log_probs_of_the_model(
    attention: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False
    )
    monkeypatch.setitem(sys.modules, "flash_attn", importlib.import_module(PLAIN).flash_attn())
    attention_backends._imported.cache_clear()
    module = build(name).bfloat16()
    exact = copy.deepcopy(module).float()
    page_size = 256 if attention == "flash_attn" else 16
    found, engine = drawn(module.cuda(), attention=attention, page_size=page_size)
    assert engine.attention is not None
    assert engine.attention.decode.name == attention
    gaps = []
    for s, request in enumerate(r for r in REQUESTS for _ in r.seeds):
        n = int(found.lengths[s])
        tokens = found.tokens[s, :n].cpu()
        ids = torch.cat([torch.tensor(request.prompt), tokens])
        with torch.no_grad():
            logits = exact(ids[None]).logits[0, len(request.prompt) - 1 : -1]
        temperature = request.sampling.temperature or 1.0
        logprobs = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        gaps.append((found.raw_logprobs[s, :n].cpu() - logprobs).abs())
    assert float(torch.cat(gaps).mean()) < 0.04  # roundings to bf16
