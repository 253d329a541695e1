"""Stage 2: what it learns, what its figures are worth, calibration, and resuming."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_fast.config import DataConfig, OptimConfig, RewardModelConfig, RunConfig
from rlhf_fast.data import PreferenceExample, load_preferences, load_sft
from rlhf_fast.engine.stopping import stops_of
from rlhf_fast.errors import ConfigError, DataError, ModelError, NumericalError, Preempted
from rlhf_fast.models.heads import Calibration, get_calibration, set_calibration
from rlhf_fast.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_fast.models.ranking_loss import PairCounts, pair_accuracy
from rlhf_fast.models.roles import RewardModel
from rlhf_fast.stages.held_out import split_by_prompt
from rlhf_fast.stages.reward_model import (
    RewardModelStage,
    calibration_of,
    run_reward_model,
)
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.training import open_metrics, open_run, setup_run
from rlhf_fast.types import PackedSequences
from tests.models.tiny import build_classifier, tokenizer
from tests.stages.tiny_runs import (
    WORDS,
    as_pairs,
    checkpoint_contents,
    demonstrations,
    exported,
    metric_lines,
    model_directory,
    ranked,
    stop_after,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    model_directory(folder / "base")
    write_rows(folder / "ranked.jsonl", ranked(120, 4))
    write_rows(folder / "pairs.jsonl", as_pairs(ranked(120, 2)))
    write_rows(folder / "demonstrations.jsonl", demonstrations(50))
    return folder


def config_for(
    base: Path, out: Path, rows: str = "ranked.jsonl", **changes: Any
) -> RewardModelConfig:
    run = {"output_dir": str(out), "threads": 1, **changes.pop("run", {})}
    config = RewardModelConfig(
        model=str(base / "base"),
        run=RunConfig(**run),
        data=DataConfig(train=str(base / rows), max_prompt_length=32, max_length=48),
        optim=OptimConfig(lr=5e-3),
        batch_size=8,
        microbatch_tokens=128,
        eval_fraction=0.25,
    )
    return dataclasses.replace(config, **changes)


def stage_for(config: RewardModelConfig, run: Run) -> RewardModelStage:
    return RewardModelStage(config, run, open_metrics(run, config), setup_run(config.run))


def gradients(config: RewardModelConfig, rows: int = 8) -> dict[str, torch.Tensor]:
    with open_run(config, "reward_model", quiet=True) as run:
        stage = stage_for(config, run)
        examples = stage.split.train[:rows]
        stage.accumulate(examples)
        named = stage.module.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}


def scores_of(model_dir: str, sequences: list[torch.Tensor]) -> torch.Tensor:
    module = load_sequence_classifier(model_dir, init_head=False, dtype="float32")
    return RewardModel(module).score_sequences(PackedSequences.from_lists(sequences))


def test_training_ranks_held_out_prompts(base: Path, tmp_path: Path, capsys: Any) -> None:
    result = run_reward_model(config_for(base, tmp_path, epochs=4), quiet=True)
    lines = metric_lines(tmp_path)
    assert lines[-1]["loss/train"] < 0.7 * lines[0]["loss/train"]
    assert result.accuracy is not None
    assert result.accuracy > 0.8
    assert result.accuracy_low is not None
    assert result.accuracy_high is not None
    assert result.accuracy_low < result.accuracy < result.accuracy_high
    assert not result.near_chance
    assert result.eval_pairs == 6 * result.eval_prompts > 0
    assert lines[-1]["eval/accuracy"] == result.accuracy
    assert lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]
    assert result.reports["train"]["kept"] == 120
    output = capsys.readouterr()
    assert "WARNING" not in output.err
    assert "held out by prompt: " in output.out
    assert "95 % interval" in result.summary()


def test_a_step_that_runs_out_of_memory_is_done_again_in_halves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = RewardModelStage.scores

    def trained(name: str, tokens: int, fits: int) -> tuple[list[dict[str, Any]], int]:
        config = config_for(base, tmp_path / name, max_steps=3, microbatch_tokens=tokens)

        def limited(stage: RewardModelStage, sequences: PackedSequences) -> torch.Tensor:
            found = scores(stage, sequences)
            if sequences.ids.numel() > fits:  # in evaluation and calibration no less
                if torch.is_grad_enabled():
                    found.sum().backward()  # what it has added is dropped with the rest
                raise torch.OutOfMemoryError("as a device says it")
            return found

        monkeypatch.setattr(RewardModelStage, "scores", limited)
        run_reward_model(config, quiet=True)
        state = checkpoint_contents(tmp_path / name)[1]
        return metric_lines(tmp_path / name), state["extra"]["token_budget"]["tokens"]

    expected, _ = trained("small", 64, 1000)
    found, tokens = trained("large", 256, 64)
    assert tokens == 64
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_sequences_end_where_responses_of_ppo_will(base: Path, tmp_path: Path) -> None:
    """A chat model that ends its turns with another token than EOS names it in a config."""
    policy = model_directory(tmp_path / "policy")
    generation = json.loads((policy / "generation_config.json").read_text())
    (policy / "generation_config.json").write_text(
        json.dumps(generation | {"eos_token_id": [2, 1]})
    )
    talk = [[{"role": "user", "content": "w4"}, {"role": "assistant", "content": w}] for w in WORDS]
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(talk[:8], talk[8:16], strict=True)]
    config = config_for(base, tmp_path / "out", model=str(policy), eval_fraction=0.0)
    template = "{% for m in messages %}w9 {{ m.content }} <bos> w8 {% endfor %}"
    rows = str(write_rows(tmp_path / "talk.jsonl", pairs))
    data = dataclasses.replace(config.data, train=rows, chat_template=template)
    with open_run(dataclasses.replace(config, data=data), "reward_model", quiet=True) as run:
        stage = stage_for(dataclasses.replace(config, data=data), run)
        read = [s.tolist() for e in stage.split.train for s in e.sequences()]
    assert all(ids[-1] == 1 for ids in read)
    assert stops_of(load_causal_lm(policy, dtype="float32"), tokenizer())[0] == [2, 2, 1]


def test_near_chance_is_a_loud_warning(base: Path, tmp_path: Path, capsys: Any) -> None:
    rows = write_rows(tmp_path / "noise.jsonl", as_pairs(ranked(120, 2, noise=True)))
    config = config_for(base, tmp_path / "out", max_steps=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(rows)))
    result = run_reward_model(config, quiet=True)
    assert result.near_chance
    assert result.accuracy_low is not None
    assert result.accuracy_low < 0.55
    assert metric_lines(tmp_path / "out")[-1]["eval/near_chance"] == 1.0
    assert "WARNING" in result.summary()
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "WARNING: this reward model is near chance" in error
    assert "PPO will exploit" in error
    run_reward_model(config, quiet=True)
    assert "near chance" in capsys.readouterr().err


def test_held_out_figures_are_those_of_the_definition(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    with open_run(config, "reward_model", quiet=True) as run:
        stage = stage_for(config, run)
        got = stage.evaluate(stage.split.held_out)
        right, pairs, loss, margin = [], [], 0.0, 0.0
        for example in stage.split.held_out:
            scores = stage.raw_scores(example.sequences()).tolist()
            k = len(scores)
            gaps = [scores[i] - scores[j] for i in range(k) for j in range(i + 1, k)]
            right.append(float(sum(g > 0 for g in gaps)))
            pairs.append(len(gaps))
            margin += sum(gaps) / len(gaps)
            terms = torch.nn.functional.softplus(-torch.tensor(gaps, dtype=torch.float64))
            loss += float(terms.mean())
    interval = pair_accuracy(PairCounts(right, pairs))
    assert got["eval/accuracy"] == interval.value
    assert got["eval/accuracy_low"] == interval.low
    assert got["eval/accuracy_high"] == interval.high
    assert got["eval/loss"] == pytest.approx(loss / len(pairs), rel=1e-5)
    assert got["eval/margin"] == pytest.approx(margin / len(pairs), rel=1e-4, abs=1e-6)


def test_two_ranked_completions_train_as_a_pair_to_the_bit(base: Path, tmp_path: Path) -> None:
    rows = ranked(40, 2)
    lists = write_rows(tmp_path / "lists.jsonl", rows)
    pairs = write_rows(tmp_path / "pairs.jsonl", as_pairs(rows))
    for name, path in (("lists", lists), ("pairs", pairs)):
        config = config_for(base, tmp_path / name, max_steps=4)
        data = dataclasses.replace(config.data, train=str(path))
        run_reward_model(dataclasses.replace(config, data=data), quiet=True)
    assert metric_lines(tmp_path / "lists") == metric_lines(tmp_path / "pairs")
    for name, weight in exported(tmp_path / "lists").items():
        assert torch.equal(weight, exported(tmp_path / "pairs")[name]), name


@pytest.mark.parametrize(
    "changes",
    [{"microbatch_tokens": 48}, {"microbatch_tokens": 4096}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_gradient_does_not_depend_on_microbatches(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    want = gradients(config_for(base, tmp_path / "a"))
    got = gradients(config_for(base, tmp_path / "b", **changes))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_gradient_is_that_of_the_definition_in_fp64(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    got = gradients(config)
    with open_run(dataclasses.replace(config, run=RunConfig(output_dir=str(tmp_path / "b"))),
                  "reward_model", quiet=True) as run:  # fmt: skip
        stage = stage_for(config, run)
        plain = stage.module.double()
        losses = []
        for example in stage.split.train[:8]:
            scores = [plain(s[None]).logits[0, 0] for s in example.sequences()]
            k = len(scores)
            pairs = [scores[i] - scores[j] for i in range(k) for j in range(i + 1, k)]
            losses.append(torch.nn.functional.softplus(-torch.stack(pairs)).mean())
        plain.zero_grad()
        torch.stack(losses).mean().backward()
    for name, parameter in plain.named_parameters():
        if name in got:
            assert parameter.grad is not None
            torch.testing.assert_close(
                got[name].double(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("human", [True, False])
@pytest.mark.parametrize("unit_gain", [True, False])
def test_calibrated_demonstrations_have_mean_zero_when_loaded_back(
    base: Path, tmp_path: Path, human: bool, unit_gain: bool
) -> None:
    path = str(base / "demonstrations.jsonl") if human else ""
    config = config_for(base, tmp_path, max_steps=4, demonstrations=path, unit_gain=unit_gain)
    result = run_reward_model(config, quiet=True)
    tokens = load_tokenizer(result.model_dir)
    if human:
        sequences = [e.ids for e in load_sft(path, tokens).examples]
    else:
        examples = load_preferences(config.data.train, tokens).examples
        train = split_by_prompt(examples, config.eval_fraction, config.run.seed).train
        sequences = [e.sequences()[0] for e in train]
    assert result.demonstrations == len(sequences)
    scores = scores_of(result.model_dir, sequences).double()
    assert abs(float(scores.mean())) < 1e-5
    if unit_gain:
        assert float(scores.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    else:
        assert result.gain == 1.0
    assert result.reports.keys() == ({"train", "demonstrations"} if human else {"train"})


def test_export_is_what_plain_transformers_loads(base: Path, tmp_path: Path) -> None:
    result = run_reward_model(config_for(base, tmp_path, max_steps=4), quiet=True)
    plain = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    sequence = torch.tensor([5, 9, 4, 4, 30, 2])
    with torch.no_grad():
        raw = plain(sequence[None]).logits[0, 0]
    got = scores_of(result.model_dir, [sequence])[0]
    torch.testing.assert_close(got, result.gain * raw + result.bias, rtol=0, atol=2e-6)
    tensors, _ = checkpoint_contents(tmp_path)
    for name, weight in exported(tmp_path).items():
        assert torch.equal(weight, tensors["reward_model"][name]), name


def test_calibration_of_the_starting_model_is_not_counted_twice(base: Path, tmp_path: Path) -> None:
    results = {}
    for name in ("plain", "calibrated"):
        module = build_classifier()
        if name == "calibrated":
            set_calibration(module, 3.0, 40.0)
        start = tmp_path / f"start-{name}"
        module.save_pretrained(start)
        tokenizer().save_pretrained(start)
        config = config_for(base, tmp_path / name, max_steps=2, model=str(start))
        results[name] = run_reward_model(config, quiet=True)
    assert metric_lines(tmp_path / "plain") == metric_lines(tmp_path / "calibrated")
    assert results["plain"].bias == results["calibrated"].bias
    again = load_sequence_classifier(
        results["calibrated"].model_dir, init_head=False, dtype="float32"
    )
    assert get_calibration(again) == Calibration(1.0, results["calibrated"].bias)


@pytest.mark.parametrize("stop_at", [2, 6])
def test_interrupted_run_resumes_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    run = {"save_every": 4}
    whole = run_reward_model(config_for(base, tmp_path / "whole", run=run), quiet=True)
    cut = config_for(base, tmp_path / "cut", run=run)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        with pytest.raises(Preempted):
            run_reward_model(cut, quiet=True)
    assert 0 < len(metric_lines(tmp_path / "cut")) < whole.steps
    resumed = run_reward_model(cut, quiet=True)
    assert metric_lines(tmp_path / "whole") == metric_lines(tmp_path / "cut")
    tensors, state = checkpoint_contents(tmp_path / "whole")
    again, state_again = checkpoint_contents(tmp_path / "cut")
    assert state == state_again
    for file, group in tensors.items():
        for name, tensor in group.items():
            assert torch.equal(tensor, again[file][name]), f"{file}/{name}"
    same = dataclasses.replace(resumed, output_dir=whole.output_dir, model_dir=whole.model_dir)
    assert same == whole


def test_going_back_to_the_end_of_a_shorter_run_evaluates_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said to have no held-out rows, and nothing warned of a model near chance."""
    run = {"save_every": 1, "keep_last": 3}
    lr = OptimConfig(lr=1e-9)
    run_reward_model(config_for(base, tmp_path, max_steps=2, optim=lr, run=run), quiet=True)
    capsys.readouterr()
    back = config_for(base, tmp_path, max_steps=1, optim=lr, run=run | {"resume_step": 1})
    result = run_reward_model(back, quiet=True)
    assert (result.steps, result.eval_prompts) == (1, 30)
    assert result.near_chance
    assert "near chance" in capsys.readouterr().err


def test_margin_column_is_used_when_asked_for(base: Path, tmp_path: Path) -> None:
    rows = [{**r, "margin": 2.0} for r in as_pairs(ranked(40, 2))]
    path = str(write_rows(tmp_path / "margins.jsonl", rows))
    first = {}
    for margin in (False, True):
        config = config_for(base, tmp_path / str(margin), max_steps=1, margin=margin)
        data = dataclasses.replace(config.data, train=path)
        run_reward_model(dataclasses.replace(config, data=data), quiet=True)
        first[margin] = metric_lines(tmp_path / str(margin))[0]
    assert first[True]["loss/train"] > first[False]["loss/train"] + 0.5
    assert first[True]["train/margin"] == first[False]["train/margin"]


def example(prompt: int, answer: int) -> PreferenceExample:
    worse = torch.tensor([answer + 1])
    return PreferenceExample(torch.tensor([prompt]), (torch.tensor([answer]), worse), 0.0, "row")


def test_split_shares_no_prompt_and_ignores_row_order() -> None:
    draw = random.Random(0)
    examples = [example(draw.randrange(50), i) for i in range(400)]
    split = split_by_prompt(examples, 0.2, seed=1)
    prompts = [{int(e.prompt_ids) for e in part} for part in split]
    assert not prompts[0] & prompts[1]
    assert len(split.train) + len(split.held_out) == 400
    assert 80 <= len(split.held_out) <= 100
    draw.shuffle(examples)
    again = split_by_prompt(examples, 0.2, seed=1)
    assert {int(e.prompt_ids) for e in again.held_out} == prompts[1]
    other = split_by_prompt(examples, 0.2, seed=2)
    assert {int(e.prompt_ids) for e in other.held_out} != prompts[1]


def test_split_edges() -> None:
    one = [example(7, i) for i in range(5)]
    assert split_by_prompt(one, 0.0, seed=1).held_out == []
    with pytest.raises(DataError, match="RF2070"):
        split_by_prompt(one, 0.1, seed=1)
    two = [*one, example(8, 0)]
    split = split_by_prompt(two, 0.9, seed=1)
    assert split.train
    assert split.held_out


def test_calibration_of_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert calibration_of(scores, unit_gain=False) == (1.0, -3.0)
    gain, bias = calibration_of(scores, unit_gain=True)
    calibrated = gain * scores + bias
    assert float(calibrated.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(calibrated.std(unbiased=False)) == pytest.approx(1.0)
    with pytest.raises(NumericalError, match="RF6030"):
        calibration_of(torch.ones(3), unit_gain=True)
    with pytest.raises(NumericalError, match="RF6030"):
        calibration_of(torch.tensor([1.0, float("nan")]), unit_gain=False)


def test_held_out_file_takes_the_place_of_the_split(base: Path, tmp_path: Path) -> None:
    rows = ranked(120, 4)
    path = str(write_rows(tmp_path / "eval.jsonl", rows[:2] + ranked(30, 3, seed=9)))
    config = config_for(base, tmp_path / "out", max_steps=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=path))
    result = run_reward_model(config, quiet=True)
    assert result.eval_prompts == 32
    assert result.eval_pairs == 2 * 6 + 30 * 3
    assert result.demonstrations == 120
    assert any("2 of 32" in warning for warning in result.reports["eval"]["warnings"])


def test_without_held_out_rows_there_is_no_accuracy(base: Path, tmp_path: Path) -> None:
    result = run_reward_model(
        config_for(base, tmp_path, max_steps=1, eval_fraction=0.0), quiet=True
    )
    assert result.accuracy is None
    assert not result.near_chance
    assert "nobody knows whether it ranks" in result.summary()


def test_mistakes_are_named_before_training(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RF1032"):
        run_reward_model(config_for(base, tmp_path / "a", microbatch_tokens=20), quiet=True)
    with pytest.raises(ModelError, match="RF3018"):
        run_reward_model(config_for(base, tmp_path / "b", init_head=False), quiet=True)
