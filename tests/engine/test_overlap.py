"""Scoring of finished samples inside generation: what may run there, what stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
import torch

from rlhf_fast.engine.hybrid import HybridEngine, Mode
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.attention_mode import attention_configs, implementations
from rlhf_fast.models.roles import Actor
from rlhf_fast.types import IGNORE_INDEX, Rollout, SamplingParams
from tests.engine.test_generator import batch_of, build, ragged, run, seeds_for

ENDS = range(2, 8)  # a tenth of the vocabulary, so that lengths differ
SAMPLING = SamplingParams(16, temperature=1.5)
# (architecture, path): the second scores on right-padded sequences with stock attention.
CASES = [("llama", "fused"), ("llama", "modules"), ("gemma2", "modules")]


class Recorder:
    """Reads finished samples with the very module that generates, and looks around."""

    def __init__(self, engine: HybridEngine, pack_tokens: int = 40) -> None:
        self.engine = engine
        self.actor = Actor(engine.module)
        self.pack_tokens = pack_tokens
        self.packs: list[list[int]] = []
        self.parts: list[Rollout] = []
        self.logprobs: dict[int, torch.Tensor] = {}
        self.seen: list[Any] = []

    def score(self, samples: Sequence[int], rollout: Rollout) -> None:
        module: Any = self.engine.module
        self.packs.append(list(samples))
        self.parts.append(rollout)
        self.seen.append(
            (
                self.engine.mode,
                module.training,
                [m.training for m in module.modules()],
                implementations(attention_configs(module)),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        self.logprobs.update(zip(samples, read(self.actor, rollout), strict=True))


def read(actor: Actor, rollout: Rollout) -> list[torch.Tensor]:
    """Log-probs of the response tokens of each sample."""
    sequences = rollout.sequences()
    bounds = sequences.cu_seqlens.tolist()
    targets = torch.full_like(sequences.ids, IGNORE_INDEX)
    places = []
    for s, (n, length) in enumerate(
        zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    ):
        at = slice(bounds[s] + n - 1, bounds[s] + n - 1 + length)
        targets[at] = sequences.ids[at.start + 1 : at.stop + 1]
        places.append(at)
    with torch.no_grad():
        found, _ = actor.logprobs(sequences, targets, temperature=SAMPLING.temperature)
    return [found[at] for at in places]


def engine_for(name: str, path: str, **settings: Any) -> HybridEngine:
    chosen = EngineSettings(path=path, page_size=4, poison=True, **settings)
    return HybridEngine(build(name), eos_ids=ENDS, settings=chosen)


def generate(engine: HybridEngine, scorer: Any, prompts: int = 8, group: int = 2) -> Rollout:
    return engine.generate(
        batch_of(ragged(prompts)),
        SAMPLING,
        samples_per_prompt=group,
        seeds=seeds_for(prompts * group),
        scorer=scorer,
    )


@pytest.mark.parametrize(("name", "path"), CASES)
def test_what_is_scored_inside_equals_what_is_scored_after(name: str, path: str) -> None:
    engine = engine_for(name, path)
    engine.module.train()
    engine.module.get_submodule("model.layers.0").eval()  # modes are kept one by one
    before = [m.training for m in engine.module.modules()]
    attention = implementations(attention_configs(engine.module))
    recorder = Recorder(engine)
    rollout = generate(engine, recorder)
    plain = run(build(name), ragged(8), SAMPLING, group=2, path=path, eos_ids=ENDS)
    assert rollout.response_ids() == plain.response_ids()
    torch.testing.assert_close(rollout.rollout_logprobs, plain.rollout_logprobs)
    assert len(recorder.packs) > 1
    assert set(map(repr, recorder.seen)) == {
        repr((Mode.SCORE, True, before, attention, False, False))
    }
    afterwards = read(recorder.actor, rollout)
    for sample, found in recorder.logprobs.items():
        torch.testing.assert_close(found, afterwards[sample], rtol=1e-5, atol=1e-6)
    assert [m.training for m in engine.module.modules()] == before
    assert implementations(attention_configs(engine.module)) == attention
    assert engine.mode is Mode.TRAIN
    assert torch.is_grad_enabled()


def test_packs_are_full_hold_finished_samples_once_and_repeat() -> None:
    runs = []
    for _ in range(2):
        engine = engine_for("llama", "fused")
        recorder = Recorder(engine)
        rollout = generate(engine, recorder)
        runs.append(recorder.packs)
        early = [s for pack in recorder.packs for s in pack]
        assert 0 < len(early) == len(set(early)) < len(rollout)
        for pack, part in zip(recorder.packs, recorder.parts, strict=True):
            tokens = part.prompt_lengths + part.lengths
            assert recorder.pack_tokens - 29 < int(tokens.sum()) <= recorder.pack_tokens
            assert part.samples_per_prompt == 1
            assert part.prompts.uid == tuple(rollout.prompts.uid[s // 2] for s in pack)
            assert part.response_ids() == [rollout.response_ids()[s] for s in pack]
            assert torch.equal(part.ended, rollout.ended[pack])
            columns = part.rollout_logprobs.shape[1]
            assert torch.equal(part.rollout_logprobs, rollout.rollout_logprobs[pack, :columns])
    assert runs[0] == runs[1]


def test_scoring_waits_for_the_tail() -> None:
    engine = engine_for("llama", "fused", max_batch=4)
    recorder = Recorder(engine, pack_tokens=30)
    seen: list[tuple[int, int]] = []
    score = recorder.score

    def watched(samples: Sequence[int], rollout: Rollout) -> None:
        runner: Any = engine._runner
        seen.append((runner.cache.allocator.live_handles, len(recorder.packs)))
        score(samples, rollout)

    recorder.score = watched  # type: ignore[method-assign]
    rollout = generate(engine, recorder)
    assert seen
    assert all(running <= 2 for running, _ in seen)
    assert sum(map(len, recorder.packs)) < len(rollout)


def test_preempted_samples_are_scored_as_they_end() -> None:
    pages = 12
    engine = HybridEngine(
        build(),
        eos_ids=ENDS,
        settings=EngineSettings(
            path="fused", page_size=4, poison=True, kv_bytes=pages * 4 * 2 * 2 * 2 * 8 * 4
        ),
    )
    engine.expected.observe(range(8), [1] * 8)
    recorder = Recorder(engine, pack_tokens=30)
    rollout = generate(engine, recorder)
    assert engine.preemptions > 0
    assert recorder.packs
    afterwards = read(recorder.actor, rollout)
    for sample, found in recorder.logprobs.items():
        torch.testing.assert_close(found, afterwards[sample], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "path"), CASES[:2])
def test_what_is_forbidden_in_scoring_is_forbidden_here(name: str, path: str) -> None:
    engine = engine_for(name, path)
    optimizer = torch.optim.SGD(engine.module.parameters(), lr=1.0)
    engine.guard(optimizer)
    before = {k: v.clone() for k, v in engine.module.state_dict().items()}
    plain = generate(engine, None)

    class Stepper(Recorder):
        def score(self, samples: Sequence[int], rollout: Rollout) -> None:
            with pytest.raises(GenerationError, match="RF4033"), engine.scoring():
                pass
            with pytest.raises(GenerationError, match="RF4033"):
                generate(engine, None)
            optimizer.step()

    with pytest.raises(GenerationError, match=r"RF4034.*score"):
        generate(engine, Stepper(engine))
    assert engine.mode is Mode.TRAIN
    assert all(torch.equal(v, before[k]) for k, v in engine.module.state_dict().items())
    engine.module(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    optimizer.step()
    with torch.no_grad():
        for key, value in engine.module.state_dict().items():
            value.copy_(before[key])
    assert generate(engine, None).response_ids() == plain.response_ids()


def test_the_padded_path_hands_nothing_over() -> None:
    engine = engine_for("llama", "padded")
    recorder = Recorder(engine)
    rollout = generate(engine, recorder)
    assert recorder.packs == []
    assert rollout.response_ids() == generate(engine, None).response_ids()


def test_what_a_scorer_reads_lives_until_its_stream_is_joined() -> None:
    """Freed earlier, a GPU's generating stream would write over what the other has yet to read."""
    engine = engine_for("llama", "fused")
    recorder, lent = Recorder(engine), list[ref[Rollout]]()
    stock = recorder.score

    def score(samples: Sequence[int], rollout: Rollout) -> None:
        stock(samples, rollout)
        recorder.parts.clear()
        lent.append(ref(rollout))
        assert all(r() is not None for r in lent)

    recorder.score = score  # type: ignore[method-assign]
    generate(engine, recorder)
    assert len(lent) > 1
    assert all(r() is None for r in lent)
