"""The fused forward on foreign attention: stand-ins with the libraries' signatures."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_fast.engine.fused_forward import FusedForward
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels.attention_backends import AttentionChoice, FlashAttention, TorchVarlen
from tests.engine.test_fused_lora import assert_same
from tests.engine.test_generator import EOS, batch_of, build, ragged, seeds_for
from tests.kernels.test_attention_backends import Flash, Varlen


@pytest.mark.parametrize("backend", [FlashAttention(Flash()), TorchVarlen(Varlen())])
@pytest.mark.parametrize("prefill_tokens", [8192, 5])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_samples_are_those_of_our_attention(name: str, prefill_tokens: int, backend: Any) -> None:
    module = build(name)
    rollouts = []
    for choice in (None, AttentionChoice(backend, backend, "asked for")):
        settings = EngineSettings(path="fused", page_size=4, prefill_tokens=prefill_tokens)
        engine = HybridEngine(module, eos_ids=[EOS], settings=settings)
        forward = engine._runner.forward  # type: ignore[union-attr]
        assert isinstance(forward, FusedForward)
        forward.attention = choice or forward.attention
        rollouts.append(
            engine.generate(
                batch_of(ragged()), SamplingParams(9), samples_per_prompt=2, seeds=seeds_for(12)
            )
        )
    assert_same(rollouts[1], rollouts[0])


def test_the_engine_says_what_attends_and_refuses_what_cannot() -> None:
    engine = HybridEngine(build(), eos_ids=[EOS])
    assert engine.attention is not None
    assert engine.attention.decode.name == "rlhf_fast"
    assert "not on cpu" in engine.attention.reason
    with pytest.raises(GenerationError, match=r"RF4032.*flash_attn cannot run"):
        HybridEngine(build(), eos_ids=[EOS], settings=EngineSettings(attention="flash_attn"))
