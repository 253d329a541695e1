"""Evaluation: its figures against plain transformers and enumeration, its files, its edges."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.config import (
    DataConfig,
    EvalConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_fast.distributed.durable import FileSystem
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentFault,
    ModelError,
    Preempted,
)
from rlhf_fast.models.loading import load_sequence_classifier
from rlhf_fast.models.roles import Reference, RewardModel
from rlhf_fast.stages.evaluate import (
    Estimate,
    EvalStage,
    best_of_n_rows,
    estimate,
    run_evaluate,
)
from rlhf_fast.stages.training import open_run
from rlhf_fast.types import PackedSequences
from tests.models.tiny import build_classifier, tokenizer
from tests.stages.tiny_runs import (
    demonstrations,
    metric_lines,
    model_directory,
    stop_after,
    write_rows,
)

FUNCTION = """
def words(completions):
    return [float(len(text.split())) for text in completions]

def picky(prompts, completions):
    return [None if prompt.startswith("w4 ") else 1.0 for prompt in prompts]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    model_directory(folder / "policy", initializer_range=0.6)
    model_directory(folder / "reference", seed=1, initializer_range=0.6)
    build_classifier(seed=2).save_pretrained(folder / "judge")
    tokenizer().save_pretrained(folder / "judge")
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(12)]
    write_rows(folder / "prompts.jsonl", prompts)
    (folder / "rewards.py").write_text(FUNCTION, encoding="utf-8")
    return folder


def config_for(base: Path, out: Path, **changes: Any) -> EvalConfig:
    config = EvalConfig(
        model=str(base / "policy"),
        reference=str(base / "reference"),
        run=RunConfig(output_dir=str(out), threads=1),
        data=DataConfig(eval=str(base / "prompts.jsonl"), max_prompt_length=16, max_length=64),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.7),
        reward=RewardConfig(model=str(base / "judge"), function=f"{base}/rewards.py:words"),
        samples_per_prompt=4,
        best_of=[1, 2, 4],
    )
    return dataclasses.replace(config, **changes)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ids_of(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    encode = tokenizer()
    response = encode(row["response"])["input_ids"]
    return encode(row["prompt"])["input_ids"], response + [2] * row["ended"]


def test_what_runs_out_of_memory_is_done_again_in_halves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_evaluate(config_for(base, tmp_path / "a"), quiet=True)
    generate, logprobs, tried = HybridEngine.generate, Reference.logprobs, []

    def few_rows(self: HybridEngine, *arguments: Any, **options: Any) -> Any:
        found = generate(self, *arguments, **options)
        if self.settings.max_batch > 8:
            raise torch.OutOfMemoryError("as a device says it")
        return found

    def few_tokens(self: Reference, sequences: PackedSequences, *rest: Any, **options: Any) -> Any:
        tried.append(len(sequences.ids))
        if len(sequences.ids) > 64:
            raise torch.OutOfMemoryError("as a device says it")
        return logprobs(self, sequences, *rest, **options)

    monkeypatch.setattr(HybridEngine, "generate", few_rows)
    monkeypatch.setattr(Reference, "logprobs", few_tokens)
    run_evaluate(config_for(base, tmp_path / "b"), quiet=True)
    assert max(tried) > 64 > min(tried)
    for mine, theirs in zip(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_every_sample_agrees_with_plain_transformers(base: Path, tmp_path: Path) -> None:
    result = run_evaluate(config_for(base, tmp_path), quiet=True)
    policy = AutoModelForCausalLM.from_pretrained(base / "policy")
    reference = AutoModelForCausalLM.from_pretrained(base / "reference")
    judge = RewardModel(load_sequence_classifier(base / "judge", init_head=False, dtype="float32"))
    rows = rows_of(tmp_path)
    assert len(rows) == 48 == result.prompts * result.samples_per_prompt
    special = 0
    for row in rows:
        prompt, response = ids_of(row)
        if len(response) != row["length"]:
            special += 1  # pad, bos or unk were drawn: the text does not show them
            continue
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            ours, theirs = (
                (m(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
                for m in (policy, reference)
            )
        chosen = torch.tensor(response)[:, None]
        kl = (ours.gather(1, chosen) - theirs.gather(1, chosen)).sum()
        entropy = -(ours.exp() * ours).sum(-1).mean()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-4)
        assert row["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        scored = judge.score_sequences(PackedSequences.from_lists([prompt + response]))
        assert row["reward_model"] == pytest.approx(float(scored), abs=1e-5)
        assert row["reward_function"] == len(row["response"].split())
        assert row["score"] == pytest.approx(row["reward_model"] + row["reward_function"])
    assert special < 24


def test_figures_and_files_agree(base: Path, tmp_path: Path) -> None:
    result = run_evaluate(config_for(base, tmp_path), quiet=True)
    rows, line = rows_of(tmp_path), metric_lines(tmp_path)
    saved = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert len(line) == 1
    for name, e in result.estimates.items():
        values = torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
        means = values.reshape(12, 4).mean(1)
        assert e.mean == pytest.approx(float(means.mean()), rel=1e-9, abs=1e-12)
        assert e.stderr == pytest.approx(float(means.std()) / math.sqrt(12), rel=1e-9, abs=1e-12)
        assert saved["estimates"][name] == {"mean": e.mean, "stderr": e.stderr, "prompts": 12}
        assert line[0][f"eval/{name}"] == e.mean
        assert name in result.summary()
    assert [row["n"] for row in result.best_of_n] == [1, 2, 4]
    proxy = torch.tensor([row["reward_model"] for row in rows]).reshape(12, 4)
    gold = torch.tensor([row["reward_function"] for row in rows]).reshape(12, 4)
    first, _, last = result.best_of_n
    assert first["proxy"] == pytest.approx(result.estimates["reward_model"].mean)
    assert last["proxy"] == pytest.approx(float(proxy.max(1).values.mean()))
    best = gold.gather(1, proxy.argmax(1, keepdim=True)).mean()
    assert last["gold"] == pytest.approx(float(best))
    assert last["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert saved["best_of_n"] == result.best_of_n
    assert saved["reports"]["prompts"]["kept"] == 12


def test_sampled_kl_and_entropy_are_those_of_enumeration(base: Path, tmp_path: Path) -> None:
    config = config_for(
        base,
        tmp_path,
        sampling=SamplingConfig(max_new_tokens=1, temperature=1.0),
        reward=RewardConfig(),
        samples_per_prompt=300,
        best_of=[],
    )
    result = run_evaluate(config, quiet=True)
    models = [AutoModelForCausalLM.from_pretrained(base / n) for n in ("policy", "reference")]
    kl, entropy = [], []
    for line in (base / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([tokenizer()(json.loads(line)["prompt"])["input_ids"]])
        with torch.no_grad():
            ours, theirs = (m(ids).logits[0, -1].double().log_softmax(-1) for m in models)
        kl.append(float((ours.exp() * (ours - theirs)).sum()))
        entropy.append(float(-(ours.exp() * ours).sum()))
    exact, found = sum(kl) / len(kl), result.estimates["kl"]
    # 3600 draws of a log-ratio whose spread is about 2 nats.
    assert abs(found.mean - exact) < 4 * 2 / math.sqrt(3600)
    assert exact > 0.5
    assert result.estimates["entropy"].mean == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)
    assert result.estimates["length"] == Estimate(1.0, 0.0, 12)


def test_directories_may_be_given_as_paths(base: Path, tmp_path: Path) -> None:
    """As `PPOResult.model_dir` is one."""
    places: dict[str, Any] = {"model": base / "policy", "reference": base / "reference"}
    run_evaluate(config_for(base, tmp_path, **places), quiet=True)
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert {name: found[name] for name in places} == {k: str(v) for k, v in places.items()}


def test_policy_against_itself_has_no_kl(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path, reference=str(base / "policy"))
    assert all(row["kl"] == 0.0 for row in run_rows(config, tmp_path))


def run_rows(config: EvalConfig, folder: Path) -> list[dict[str, Any]]:
    run_evaluate(config, quiet=True)
    return rows_of(folder)


def test_batching_changes_nothing_but_rounding(base: Path, tmp_path: Path) -> None:
    want = run_rows(config_for(base, tmp_path / "a"), tmp_path / "a")
    small = config_for(base, tmp_path / "b", max_batch=3, microbatch_tokens=20)
    for row, other in zip(want, run_rows(small, tmp_path / "b"), strict=True):
        assert (row["prompt"], row["response"]) == (other["prompt"], other["response"])
        for name in ("kl", "entropy", "reward_model"):
            assert row[name] == pytest.approx(other[name], abs=2e-5)


def test_the_same_command_evaluates_again_to_the_same_figures(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    first = run_evaluate(config, quiet=True)
    before = (tmp_path / "samples.jsonl").read_bytes()
    assert run_evaluate(config, quiet=True) == first
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert len(metric_lines(tmp_path)) == 1


def test_another_config_evaluates_again_in_the_same_directory(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_evaluate(config_for(base, tmp_path), quiet=True)
    fewer = config_for(base, tmp_path, max_prompts=4, reference="", best_of=[])
    assert run_evaluate(fewer, quiet=True).prompts == 4
    assert caplog.messages == []
    assert len(rows_of(tmp_path)) == 16
    assert json.loads((tmp_path / "run.json").read_bytes())["config"]["max_prompts"] == 4
    assert "eval/kl" not in metric_lines(tmp_path)[0]


def test_an_evaluation_that_fails_leaves_the_earlier_one(base: Path, tmp_path: Path) -> None:
    run_evaluate(config_for(base, tmp_path), quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}
    assert {"run.json", "eval.json", "samples.jsonl", "metrics.jsonl"} <= set(before)
    with pytest.raises(ModelError):
        run_evaluate(config_for(base, tmp_path, model=str(base / "none")), quiet=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


class _Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("name", ["run.json", "samples.jsonl", "eval.json"])
def test_killed_while_it_writes_it_leaves_no_result_beside_another_record(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_evaluate(config_for(base, tmp_path), quiet=True)
    fewer = config_for(base, tmp_path, max_prompts=4, reference="", best_of=[])
    original = FileSystem.replace

    def dies(fs: FileSystem, source: Path, target: Path) -> None:
        if target.name == name:
            raise _Killed
        original(fs, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "replace", dies)
        with pytest.raises(_Killed):
            run_evaluate(fewer, quiet=True)
    assert not (tmp_path / "eval.json").exists()
    assert run_evaluate(fewer, quiet=True).prompts == 4
    assert json.loads((tmp_path / "eval.json").read_bytes())["prompts"] == 4


def test_a_full_disk_leaves_the_earlier_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_evaluate(config_for(base, tmp_path), quiet=True)
    names = ("run.json", "samples.jsonl", "eval.json")
    before = [(tmp_path / name).read_bytes() for name in names]

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "write", full)
        with pytest.raises(EnvironmentFault, match="RF7101"):
            run_evaluate(config_for(base, tmp_path, max_prompts=4), quiet=True)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_a_sink_that_is_missing_is_found_before_anything_is_generated(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(base, tmp_path)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, sinks=["wandb"]))
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(EvalStage, "generate", lambda *_: pytest.fail("it went on"))
    with pytest.raises(EnvironmentFault, match="RF7104"):
        run_evaluate(config, quiet=True)


def test_other_runs_are_not_evaluated_over(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    with open_run(SFTConfig(run=config.run), "sft", quiet=True):
        pass
    with pytest.raises(CheckpointError, match="RF8202"):
        run_evaluate(config, quiet=True)
    assert json.loads((tmp_path / "run.json").read_bytes())["stage"] == "sft"
    evaluated = config_for(base, tmp_path / "eval")
    run_evaluate(evaluated, quiet=True)
    never = dataclasses.replace(evaluated.run, resume="never")
    with pytest.raises(CheckpointError, match="RF8203"):
        run_evaluate(dataclasses.replace(evaluated, run=never), quiet=True)
    with (
        pytest.raises(CheckpointError, match="RF8202"),
        open_run(SFTConfig(run=evaluated.run), "sft", quiet=True),
    ):
        pass


def test_max_prompts_takes_a_sample_that_the_seed_decides(base: Path, tmp_path: Path) -> None:
    chosen = {}
    for seed in (1, 2):
        out = tmp_path / str(seed)
        run = RunConfig(output_dir=str(out), seed=seed, threads=1)
        config = config_for(base, out, run=run, max_prompts=4, samples_per_prompt=1, best_of=[])
        chosen[seed] = [row["prompt"] for row in run_rows(config, out)]
    assert len(chosen[1]) == len(chosen[2]) == 4
    assert chosen[1] != chosen[2]


def test_rows_a_function_abstains_from_are_left_out(base: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": "w4 w5"}, {"prompt": "w6 w5"}, {"prompt": "w7"}]
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    config = config_for(
        base,
        tmp_path / "out",
        data=DataConfig(eval=str(path)),
        reward=RewardConfig(function=f"{base}/rewards.py:picky"),
    )
    result = run_evaluate(config, quiet=True)
    assert result.estimates["score"] == Estimate(1.0, 0.0, 2)
    rows = rows_of(tmp_path / "out")
    assert [row["score"] for row in rows] == [None] * 4 + [1.0] * 8
    assert result.best_of_n[-1]["reward_function"] == 1.0
    assert result.best_of_n_prompts == 2
    assert "best of n of 2 prompts; the others have samples without a score" in result.summary()
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["best_of_n_prompts"] == 2


@pytest.mark.parametrize("name", ["reward_model", "reward_function"])
def test_one_judge_alone_goes_by_its_own_name(base: Path, tmp_path: Path, name: str) -> None:
    judge = {"reward_model": str(base / "judge"), "reward_function": f"{base}/rewards.py:words"}
    reward = RewardConfig(**{name.removeprefix("reward_"): judge[name]})
    result = run_evaluate(config_for(base, tmp_path, reward=reward), quiet=True)
    assert list(result.best_of_n[0]) == ["n", "kl", name, f"{name}_stderr"]
    assert result.best_of_n[0][name] == pytest.approx(result.estimates[name].mean)
    values = torch.tensor([row[name] for row in rows_of(tmp_path)]).reshape(12, 4)
    assert result.best_of_n[2][name] == pytest.approx(float(values.max(1).values.mean()))
    assert metric_lines(tmp_path)[0]["eval/best_of_4"] == result.best_of_n[2][name]
    assert "gold" not in result.summary()
    assert result.best_of_n_prompts == result.prompts
    assert "best of n of" not in result.summary()
    assert f"best of 4        {name} " in result.summary()


def test_greedy_says_that_kl_is_not_the_policys(base: Path, tmp_path: Path, capsys: Any) -> None:
    greedy = SamplingConfig(max_new_tokens=4, temperature=0.0)
    run_evaluate(config_for(base, tmp_path, sampling=greedy), quiet=True)
    assert "are not those of the policy" in capsys.readouterr().out


def test_a_signal_stops_between_chunks(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(Preempted):
        run_evaluate(config_for(base, tmp_path, max_batch=1), quiet=True)
    assert not (tmp_path / "eval.json").exists()


def test_estimate_counts_prompts_not_samples() -> None:
    values = torch.tensor([[0.0, 2.0], [4.0, math.nan], [math.nan, math.nan]]).double()
    got = estimate(values)
    assert got == Estimate(2.5, pytest.approx(math.sqrt(4.5 / 2)), 2)
    one = estimate(torch.ones(1, 5))
    assert one.mean == 1.0
    assert math.isnan(one.stderr)
    assert estimate(torch.full((2, 2), math.nan)).prompts == 0


def test_best_of_n_without_anything_to_select_by() -> None:
    assert best_of_n_rows({"length": torch.ones(4)}, [2], 2) == []
    assert best_of_n_rows({"reward_model": torch.full((4,), math.nan)}, [2], 2) == []
    assert best_of_n_rows({"reward_model": torch.ones(4)}, [], 2) == []


def test_mistakes_are_named_before_generating(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RF1031"):
        run_evaluate(EvalConfig(), quiet=True)
    long = SamplingConfig(max_new_tokens=63)
    with pytest.raises(ModelError, match="RF3022"):
        run_evaluate(config_for(base, tmp_path / "a", sampling=long), quiet=True)
    with pytest.raises(ConfigError, match="RF1032"):
        run_evaluate(config_for(base, tmp_path / "b", microbatch_tokens=8), quiet=True)
