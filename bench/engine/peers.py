"""Other generators on the weights, prompts and lengths of `bench_generate`.

    generate             transformers: one padded batch, to the longest response
    generate_batch       transformers' continuous batching as it is called: every call makes its
                         manager, cache and, on a GPU, graphs, and one limit holds for all
    continuous_batching  the same with a manager that runs on between calls: nothing is made inside
                         the time, and each request has its own length
    vllm                 where it is installed; a copy of the weights, made before the time starts

They draw at temperature 1 and return tokens; the engine returns log-probs too. Each maker warms up
what it keeps; the first round of `bench_generate` is not counted either.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from rlhf_fast.engine.transformers_runner import PAGE_SIZE
from rlhf_fast.models.attention_mode import attention_configs, attention_mode

Side = Callable[[], None]
_PAGE_TOKENS = 32


def generate(model: Any, prompts: list[list[int]], lengths: list[int]) -> Side:
    """One padded batch; rows that ended go on to the longest."""
    ids = torch.tensor(prompts, device=model.device)
    longest = max(lengths)

    def run() -> None:
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + longest

    return run


def _continuous_config(prompts: list[list[int]], lengths: list[int]) -> ContinuousBatchingConfig:
    """Room for everybody at once; on its own it would take most of the memory.

    Prompts are not shared between calls, so that each call reads them.
    """
    pages = sum(-(-(len(p) + n) // _PAGE_TOKENS) for p, n in zip(prompts, lengths, strict=True))
    sizes: dict[str, Any] = {PAGE_SIZE: _PAGE_TOKENS, "num_blocks": 2 * pages + 8}
    sizes["max_batch_tokens"] = max(64, sum(map(len, prompts)))
    return ContinuousBatchingConfig(allow_block_sharing=False, **sizes)


def _sampling(limit: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1,
        pad_token_id=0,
    )  # fmt: skip


def generate_batch(model: Any, prompts: list[list[int]], lengths: list[int]) -> Side:
    """A call with everything that it makes; its one limit is the longest length."""
    longest = max(lengths)
    config = _continuous_config(prompts, [longest] * len(prompts))

    def run() -> None:
        out = model.generate_batch(
            inputs=prompts, generation_config=_sampling(longest), continuous_batching_config=config
        )
        assert [len(o.generated_tokens) for o in out.values()] == [longest] * len(prompts)

    return run


def continuous_batching(model: Any, prompts: list[list[int]], lengths: list[int]) -> Side:
    """A manager that lives as long as the process, with a warm-up behind it."""
    before = model.config._attn_implementation
    manager = model.init_continuous_batching(
        generation_config=_sampling(max(lengths)),
        continuous_batching_config=_continuous_config(prompts, lengths),
    )
    chosen = model.config._attn_implementation
    if chosen != before:
        model.set_attn_implementation(before)
    configs = attention_configs(model)

    def run() -> None:
        with attention_mode(configs, chosen):
            if not manager.is_running():
                manager.warmup()
                manager.start()
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length)
            done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=1)
                assert result is not None or manager.is_running(), "continuous batching stopped"
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    done += 1

    def close() -> None:
        manager.stop(block=True)
        manager.destroy()

    run.close = close  # type: ignore[attr-defined]
    return run


def vllm(model: Any, prompts: list[list[int]], lengths: list[int]) -> Side:
    """vLLM on a copy of the weights; it is importable where this is called."""
    from vllm import LLM
    from vllm import SamplingParams as Sampling

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        engine = LLM(
            model=directory,
            skip_tokenizer_init=True,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max(map(len, prompts)) + max(lengths),
            max_num_seqs=len(prompts),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,
        )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    limits = [Sampling(max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]

    def run() -> None:
        out = engine.generate(given, limits, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in out] == lengths

    return run


MAKERS = {
    "generate": generate,
    "generate_batch": generate_batch,
    "continuous_batching": continuous_batching,
    "vllm": vllm,
}


def installed(peer: str) -> bool:
    """Whether a peer can run here."""
    return peer != "vllm" or importlib.util.find_spec("vllm") is not None


def close(sides: dict[str, Side]) -> None:
    """End what sides keep running."""
    for side in sides.values():
        getattr(side, "close", lambda: None)()
