"""Every architecture that is said to run on pages, against stock `generate` and teacher forcing."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.engine.module_forward import PAGED_MODEL_TYPES
from rlhf_fast.engine.transformers_path import TRANSFORMERS_MODEL_TYPES, version_fault
from rlhf_fast.types import SamplingParams
from tests.engine.architectures import known, tiny
from tests.engine.test_generator import EOS, ragged, run, trainer_logprobs

MODEL_TYPES = {"modules": PAGED_MODEL_TYPES}
if version_fault() is None:
    MODEL_TYPES["transformers"] = TRANSFORMERS_MODEL_TYPES


@pytest.mark.parametrize("model_type", sorted(PAGED_MODEL_TYPES | TRANSFORMERS_MODEL_TYPES))
def test_greedy_tokens_and_logprobs_equal_transformers(model_type: str) -> None:
    if not known(model_type):
        pytest.skip(f"this transformers has no {model_type}")
    module, prompts, length = tiny(model_type), ragged(4), 8
    expected = []
    for prompt in prompts:
        # Alone: the left padding of a batch is not a thing that every architecture gets right.
        ids = torch.tensor([prompt])
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
            eos_token_id=EOS, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    for path in [path for path, types in MODEL_TYPES.items() if model_type in types]:
        rollout = run(module, prompts, SamplingParams(length, temperature=0.0), path=path)
        assert rollout.response_ids() == expected, path
        for s, row in enumerate(trainer_logprobs(module, rollout)):
            got = rollout.rollout_logprobs[s, : len(row)].tolist()
            assert got == pytest.approx(row, abs=1e-5), path
