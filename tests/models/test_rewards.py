"""Rewards: what a user's function may return, and whose fault it is when it does not."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from rlhf_fast.errors import ModelError, RewardError
from rlhf_fast.models.heads import set_calibration
from rlhf_fast.models.reward_function import FunctionReward, load_reward_function
from rlhf_fast.models.rewards import ModelReward, SumReward, spread_to_tokens
from rlhf_fast.models.roles import RewardModel
from rlhf_fast.protocols import Reward
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout, SamplingParams
from tests.models.tiny import EOS, build_classifier, tokenizer

RESPONSES = [[5, 6, EOS], [7], [8, 9, 10, EOS], [EOS]]


def make_rollout(responses: list[list[int]] = RESPONSES, **columns: list[Any]) -> Rollout:
    """Two prompts, two samples each; sample 1 is truncated."""
    count, width = len(responses), max(map(len, responses), default=0)
    lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
    ids = torch.zeros(count, width, dtype=torch.int64)
    for s, response in enumerate(responses):
        ids[s, : len(response)] = torch.tensor(response)
    prompts = [[11, 12], [13]][: count // 2]
    rows = tuple({k: v[b] for k, v in columns.items()} for b in range(len(prompts)))
    return Rollout(
        prompts=PromptBatch(
            PackedSequences.from_lists(prompts),
            tuple(range(len(prompts))),
            rows,
            ("first prompt", "second prompt")[: len(prompts)],
        ),
        samples_per_prompt=2,
        responses=ids,
        response_mask=torch.arange(width)[None] < lengths[:, None],
        lengths=lengths,
        ended=torch.tensor([r[-1] == EOS for r in responses], dtype=torch.bool),
        rollout_logprobs=torch.zeros(count, width),
        sampling=SamplingParams(max_new_tokens=4),
        weight_version=0,
    )


def returning(value: Any) -> Any:
    return lambda completions: value


def test_function_receives_texts_and_columns() -> None:
    seen: dict[str, Any] = {}

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [float(len(c.split())) for c in completions]

    reward = FunctionReward(score, tokenizer())
    assert isinstance(reward, Reward)
    out = reward.score(make_rollout(answer=["a", "b"], level=[1, 2]))
    assert out.scores.tolist() == [2, 1, 3, 0]
    assert out.scored.all()
    assert seen == {
        "prompts": ["first prompt"] * 2 + ["second prompt"] * 2,
        "completions": ["w5 w6", "w7", "w8 w9 w10", ""],
        "completion_ids": [[5, 6, 2], [7], [8, 9, 10, 2], [2]],
        "answer": ["a", "a", "b", "b"],
        "level": [1, 1, 2, 2],
    }


def test_function_gets_only_the_columns_it_names() -> None:
    def by_answer(completions: list[str], answer: list[str]) -> list[bool]:
        return [a in c for a, c in zip(answer, completions, strict=True)]

    out = FunctionReward(by_answer, tokenizer()).score(make_rollout(answer=["w5", "w9"], x=[1, 2]))
    assert out.scores.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, True, -3],
        (1, 2.5, 1, -3),
        torch.tensor([1, 2.5, 1, -3]),
        np.array([1, 2.5, 1, -3]),
        [torch.tensor(1), torch.tensor([2.5])[0], np.float64(1), np.int32(-3)],
        iter([1, 2.5, 1, -3]),
    ],
    ids=["list", "tuple", "tensor", "numpy", "scalars", "iterator"],
)
def test_number_types(value: Any) -> None:
    out = FunctionReward(returning(value), tokenizer()).score(make_rollout())
    assert out.scores.dtype == torch.float32
    assert out.scores.tolist() == [1, 2.5, 1, -3]


def test_none_abstains() -> None:
    out = FunctionReward(returning([1.0, None, 0.0, None]), tokenizer()).score(make_rollout())
    assert out.scored.tolist() == [True, False, True, False]
    assert out.scores.tolist() == [1, 0, 0, 0]


def test_per_token_scores() -> None:
    value = [[1, 2, 3], None, torch.tensor([1.0, 0, 0, 4]), 7]
    out = FunctionReward(returning(value), tokenizer()).score(make_rollout())
    assert out.scores.tolist() == [[1, 2, 3, 0], [0] * 4, [1, 0, 0, 4], [7, 0, 0, 0]]
    assert out.scored.tolist() == [True, False, True, True]


def test_per_token_scores_of_unchosen_tokens_are_dropped() -> None:
    rollout = make_rollout()
    rollout.response_mask[2, 1] = False
    value = [0, 0, [1, 2, 3, 4], 0]
    out = FunctionReward(returning(value), tokenizer()).score(rollout)
    assert out.scores[2].tolist() == [1, 0, 3, 4]


@pytest.mark.parametrize(
    ("bad", "code", "shown"),
    [
        (math.nan, "RF5007", "row 2 was scored nan"),
        (math.inf, "RF5007", "row 2 was scored inf"),
        (1e39, "RF5007", "row 2 was scored 1e.39"),
        ("good", "RF5007", "row 2 was scored 'good'"),
        (1j, "RF5007", "row 2 was scored 1j"),
        ({"score": 1}, "RF5007", "row 2 was scored"),
        (torch.tensor(math.nan), "RF5007", "row 2 was scored nan"),
        ([1, 2], "RF5006", "row 2 has 2 per-token scores for 4 response tokens"),
        ([1, 2, 3, None], "RF5007", "row 2 was scored None"),
    ],
)
def test_bad_values_name_row_value_and_function(bad: Any, code: str, shown: str) -> None:
    value = [0.0, 0.0, bad, 0.0]
    reward = FunctionReward(returning(value), tokenizer())
    with pytest.raises(RewardError, match=rf"(?s){code}: {shown}.*test_rewards\.py:\d+"):
        reward.score(make_rollout())
    kept = FunctionReward(returning(value), tokenizer(), on_error="abstain").score(make_rollout())
    assert kept.scored.tolist() == [True, True, False, True]
    assert kept.scores.isfinite().all()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([1.0], "1 values"),
        ([], "0 values"),
        ([1.0] * 5, "5 values"),
        (None, "NoneType"),
        (1.0, "float"),
        ("1234", "str"),
        ({0: 1, 1: 1, 2: 1, 3: 1}, "dict"),
        ({1.0, 2.0, 3.0, 4.0}, "set"),
        (torch.tensor(1.0), "float"),
    ],
)
@pytest.mark.parametrize("on_error", ["fail", "abstain"])
def test_wrong_number_of_values_always_fails(value: Any, found: str, on_error: Any) -> None:
    reward = FunctionReward(returning(value), tokenizer(), on_error=on_error)
    with pytest.raises(RewardError, match=rf"(?s)RF5005.*{found}.*list of 4 values"):
        reward.score(make_rollout())


def broken(completions: list[str]) -> list[float]:
    lengths = [len(c) for c in completions]
    return [1 / n for n in lengths]


def test_exception_names_the_line_of_the_user() -> None:
    line = broken.__code__.co_firstlineno + 2
    with pytest.raises(RewardError, match=rf"(?s)RF5004.*ZeroDivisionError.*rewards\.py:{line}"):
        FunctionReward(broken, tokenizer()).score(make_rollout())
    with pytest.raises(RewardError, match="RF5004") as caught:
        FunctionReward(broken, tokenizer(), timeout_s=30).score(make_rollout())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def late(completions: list[str]) -> Iterator[float]:
    yield 1.0
    raise ValueError("late")


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_generator_that_raises_is_the_user_s_fault_too(timeout: float | None) -> None:
    line = late.__code__.co_firstlineno + 2
    with pytest.raises(RewardError, match=rf"(?s)RF5004.*ValueError: late.*rewards\.py:{line}"):
        FunctionReward(late, tokenizer(), timeout_s=timeout).score(make_rollout())
    reward = FunctionReward(late, tokenizer(), timeout_s=timeout, on_error="abstain")
    assert not reward.score(make_rollout()).scored.any()


def test_exception_can_abstain(caplog: pytest.LogCaptureFixture) -> None:
    out = FunctionReward(broken, tokenizer(), on_error="abstain").score(make_rollout())
    assert not out.scored.any()
    assert (out.scores == 0).all()
    assert "all 4 rows abstain" in caplog.text


def test_timeout() -> None:
    def slow(completions: list[str]) -> list[float]:
        time.sleep(5)
        return [0.0] * len(completions)

    start = time.monotonic()
    with pytest.raises(RewardError, match="RF5003"):
        FunctionReward(slow, tokenizer(), timeout_s=0.05).score(make_rollout())
    out = FunctionReward(slow, tokenizer(), timeout_s=0.05, on_error="abstain").score(
        make_rollout()
    )
    assert not out.scored.any()
    assert time.monotonic() - start < 4
    quick = FunctionReward(returning([1] * 4), tokenizer(), timeout_s=30).score(make_rollout())
    assert quick.scored.all()


def test_column_that_clashes_with_an_argument() -> None:
    with pytest.raises(RewardError, match=r"RF5002.*completions"):
        FunctionReward(returning([0] * 4), tokenizer()).score(make_rollout(completions=["a", "b"]))


def test_callable_objects_and_partials_have_a_place() -> None:
    class Judge:
        def __call__(self, completions: list[str]) -> None:
            return None

    for function in (Judge(), functools.partial(broken), Judge().__call__):
        with pytest.raises(RewardError, match=r"test_rewards\.py:\d+"):
            FunctionReward(function, tokenizer()).score(make_rollout())


def test_empty_rollout() -> None:
    out = FunctionReward(returning(None), tokenizer()).score(make_rollout([]))
    assert out.scores.shape == out.scored.shape == (0,)


def test_load_reward_function(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("BONUS = 3\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from helper import BONUS\nX = 1\ndef score(completions):\n    return [BONUS] * 4\n"
    )
    function = load_reward_function(f"{file}:score")
    assert FunctionReward(function, tokenizer()).score(make_rollout()).scores.tolist() == [3] * 4
    with pytest.raises(RewardError, match=r"(?s)RF5009.*'scores' does not exist.*score"):
        load_reward_function(f"{file}:scores")
    with pytest.raises(RewardError, match="RF5009: 'X' is not callable"):
        load_reward_function(f"{file}:X")
    with pytest.raises(RewardError, match="RF5008: no such reward file"):
        load_reward_function(f"{tmp_path}/none.py:score")
    for spec in ("score", "mine.py", "mine.py:", "mine.txt:score", ""):
        with pytest.raises(RewardError, match="RF5008: not a reward function"):
            load_reward_function(spec)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\nimport no_such_module_here\n", 2),
        ("x = 1\ny = (\nz z\n", 2),
        ("1 / 0\n", 1),
        ("import sys\nsys.exit(0)\n", 2),
    ],
)
def test_reward_file_that_fails_names_its_line(tmp_path: Path, source: str, line: int) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(RewardError, match=rf"(?s)RF5010.*bad\.py:{line}"):
        load_reward_function(f"{file}:score")


def test_model_reward_scores_prompt_and_response() -> None:
    module = build_classifier("llama")
    set_calibration(module, 2.0, 0.5)
    reward_model = RewardModel(module)
    rollout = make_rollout()
    out = ModelReward(reward_model, tokenizer(), tokenizer()).score(rollout)
    expected = reward_model.score_sequences(
        PackedSequences.from_lists([[11, 12, 5, 6, EOS], [11, 12, 7], [13, 8, 9, 10, EOS], [13, 2]])
    )
    torch.testing.assert_close(out.scores, expected)
    assert out.scored.all()


def test_model_reward_with_another_tokenizer() -> None:
    reward_model = RewardModel(build_classifier("llama", vocab_size=60))
    other = tokenizer(60)
    with pytest.raises(ModelError, match="RF3023"):
        ModelReward(reward_model, tokenizer(), other)
    reward = ModelReward(
        reward_model, tokenizer(), other, retokenize=True, render=lambda p, c: f"{p} w50 {c}"
    )
    expected = reward_model.score_sequences(
        PackedSequences.from_lists(
            [[11, 12, 50, 5, 6, EOS], [11, 12, 50, 7], [13, 50, 8, 9, 10, EOS], [13, 50, EOS]]
        )
    )
    torch.testing.assert_close(reward.score(make_rollout()).scores, expected)


class Reader:
    """In the place of a judge: keeps the tokens it is given."""

    def __init__(self) -> None:
        self.module = build_classifier("llama", vocab_size=600, max_position_embeddings=200)
        self.rows: list[list[int]] = []

    def score_sequences(self, sequences: PackedSequences, *, token_budget: int) -> torch.Tensor:
        self.rows = [part.tolist() for part in sequences.ids.split(sequences.lengths.tolist())]
        return torch.zeros(len(sequences))


def read_by_another(render: Any = None) -> tuple[list[str], list[str]]:
    """What a judge with a tokenizer of bytes reads of the four samples, and its tokens."""
    judge, theirs = Reader(), bytes_with_bos_and_eos()
    ours = tokenizer()
    ours.add_tokens(["[E]"])  # a word of ours that spells a control token of theirs
    rollout = make_rollout([[5, len(ours) - 1, EOS], [7], [8, EOS], [EOS]])
    reward = ModelReward(judge, ours, theirs, retokenize=True, render=render)  # type: ignore[arg-type]
    reward.score(rollout)
    return theirs.batch_decode(judge.rows), theirs.convert_ids_to_tokens(judge.rows[0])


def bytes_with_bos_and_eos() -> Any:
    """Adds a BOS and an EOS to every text that it is given."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        special_tokens=["[B]", "[E]"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([""], trainer)
    backend.post_processor = TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 0), ("[E]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[B]", eos_token="[E]")


def test_another_tokenizer_reads_the_sample_as_it_stands() -> None:
    """With the space between prompt and response, an EOS where the row ended and nowhere else."""
    texts, first = read_by_another()
    assert texts == ["[B]w11 w12 w5 [E][E]", "[B]w11 w12 w7", "[B]w13 w8[E]", "[B]w13[E]"]
    # Of the two [E] of the first, one is text.
    assert first.count("[E]") == 1
    assert first[-4:] == ["[", "E", "]", "[E]"]


def test_what_a_render_writes_are_control_tokens_and_what_it_is_given_is_text() -> None:
    texts, first = read_by_another(lambda prompt, text: f"[B]{prompt}[E]{text}[E]")
    assert texts[:2] == ["[B]w11 w12[E]w5 [E][E]", "[B]w11 w12[E]w7[E]"]
    assert first.count("[B]") == 1
    assert first.count("[E]") == 2


def test_model_reward_refuses_what_it_cannot_score() -> None:
    short = RewardModel(build_classifier("llama", max_position_embeddings=4))
    with pytest.raises(RewardError, match=r"(?s)RF5012.*2 of 4.*sample 0 has 5 tokens.*4"):
        ModelReward(short, tokenizer(), tokenizer()).score(make_rollout())
    module = build_classifier("llama")
    with torch.no_grad():
        module.score.weight.fill_(math.nan)
    with pytest.raises(RewardError, match="RF5011"):
        ModelReward(RewardModel(module), tokenizer(), tokenizer()).score(make_rollout())


def test_sum_of_rewards() -> None:
    tok = tokenizer()
    first = FunctionReward(returning([1.0, None, 3.0, None]), tok)
    second = FunctionReward(returning([10.0, 20.0, None, None]), tok)
    out = SumReward([(1.0, first), (0.5, second)]).score(make_rollout())
    assert out.scores.tolist() == [6, 10, 3, 0]
    assert out.scored.tolist() == [True, True, True, False]
    per_token = FunctionReward(returning([[1, 1, 1], None, None, [2]]), tok)
    mixed = SumReward([(1.0, first), (2.0, per_token)]).score(make_rollout())
    assert mixed.scores.tolist() == [[2, 2, 3, 0], [0] * 4, [0, 0, 0, 3], [4, 0, 0, 0]]
    assert mixed.scored.tolist() == [True, False, True, True]
    with pytest.raises(RewardError, match="RF5013"):
        SumReward([])


def test_spread_lands_on_the_last_true_column() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    out = spread_to_tokens(torch.tensor([5.0, 6.0, 7.0]), mask)
    assert out.tolist() == [[0, 0, 5, 0], [0, 0, 0, 0], [0, 0, 0, 7]]
