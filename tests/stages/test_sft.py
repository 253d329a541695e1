"""Stage 1: what it learns, that batching does not change it, that an interruption does not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.config import DataConfig, OptimConfig, RunConfig, SFTConfig
from rlhf_fast.data import SFTExample, collate_sft
from rlhf_fast.errors import ConfigError, DataError, EnvironmentFault, ModelError, Preempted
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.models.roles import Actor
from rlhf_fast.stages import sft
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.sft import SFTStage, hit_count, nll_sum, run_sft
from rlhf_fast.stages.training import open_metrics, open_run, setup_run
from tests.models.tiny import build
from tests.stages.tiny_runs import (
    checkpoint_contents,
    demonstrations,
    exported,
    metric_lines,
    model_directory,
    stop_after,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(200))
    write_rows(folder / "eval.jsonl", demonstrations(40, seed=1))
    return folder


def config_for(base: Path, out: Path, **changes: Any) -> SFTConfig:
    run = {"output_dir": str(out), "threads": 1, **changes.pop("run", {})}
    config = SFTConfig(
        model=str(base / "base"),
        run=RunConfig(**run),
        data=DataConfig(
            train=str(base / "train.jsonl"),
            eval=str(base / "eval.jsonl"),
            max_prompt_length=32,
            max_length=48,
        ),
        optim=OptimConfig(lr=1e-2, schedule="cosine"),
        max_steps=12,
        batch_size=16,
        microbatch_tokens=64,
    )
    return dataclasses.replace(config, **changes)


def stage_for(config: SFTConfig, run: Run) -> SFTStage:
    return SFTStage(config, run, open_metrics(run, config), setup_run(config.run))


def gradients(config: SFTConfig, examples: list[SFTExample]) -> dict[str, torch.Tensor]:
    with open_run(config, "sft", quiet=True) as run:
        stage = stage_for(config, run)
        tokens = sum(b.num_loss_tokens for b in stage.pack(examples))
        stage.accumulate(examples, tokens)
        named = stage.actor.module.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}


def test_training_learns_and_reports(base: Path, tmp_path: Path) -> None:
    result = run_sft(config_for(base, tmp_path, max_steps=60), quiet=True)
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["loss/train"] < 0.5 * lines[0]["loss/train"]
    assert lines[-1]["loss/eval"] == result.eval_loss
    assert result.eval_loss is not None
    assert result.eval_perplexity == pytest.approx(math.exp(result.eval_loss))
    assert result.eval_token_accuracy is not None
    assert result.eval_token_accuracy > 0.25  # chance is 1 in 37
    assert lines[0]["lr"] == pytest.approx(1e-2)
    assert lines[-1]["lr"] < 1e-4
    assert result.reports["train"]["kept"] == 200
    assert result.reports["eval"]["kept"] == 40
    for word in ("60 steps", "perplexity", "token accuracy", result.model_dir):
        assert word in result.summary()


def test_a_run_that_diverged_still_says_what_it_found(base: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=50.0, schedule="constant")
    result = run_sft(config_for(base, tmp_path, max_steps=2, optim=optim), quiet=True)
    assert result.eval_loss is not None
    assert result.eval_loss > 710  # beyond exp
    assert "perplexity 1.0142e+304," in result.summary()
    assert metric_lines(tmp_path)[-1]["eval/perplexity"] == result.eval_perplexity


def test_export_is_what_plain_transformers_loads(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    result = run_sft(config, quiet=True)
    plain = AutoModelForCausalLM.from_pretrained(result.model_dir)
    again = load_causal_lm(result.model_dir, dtype="float32")
    ids = torch.tensor([[5, 9, 11, 30, 2]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, again(ids).logits)
    tokens = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokens.pad_token_id == plain.config.pad_token_id
    assert tokens.pad_token_id != tokens.eos_token_id
    assert plain.generation_config.eos_token_id == tokens.eos_token_id
    assert tokens.chat_template
    tensors, _ = checkpoint_contents(tmp_path)
    for name, weight in exported(tmp_path).items():
        assert torch.equal(weight, tensors["actor"][name]), name


def test_chat_template_of_the_config_travels_with_the_export(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    config = config_for(base, tmp_path, max_steps=1)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, chat_template=template)
    )
    result = run_sft(config, quiet=True)
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == template


def test_gradient_is_that_of_the_mean_over_response_tokens(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        stage = stage_for(config, run)
        examples = [stage.data[i] for i in range(16)]
    got = gradients(dataclasses.replace(config, run=RunConfig(output_dir=str(tmp_path / "b"))),
                    examples)  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base / "base").double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = plain(example.ids[None]).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(1, example.ids[1:, None])[:, 0]
        total = total - logprobs[example.loss_mask[1:]].sum()
        tokens += int(example.loss_mask[1:].sum())
    (total / tokens).backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            got[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"microbatch_tokens": 16},
        {"microbatch_tokens": 4096},
        {"packing": False},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_gradient_depends_on_neither_packing_nor_microbatches(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    reference = config_for(base, tmp_path / "a")
    with open_run(reference, "sft", quiet=True) as run:
        stage = stage_for(reference, run)
        examples = [stage.data[i] for i in range(16)]
    want = gradients(reference, examples)
    got = gradients(config_for(base, tmp_path / "b", **changes), examples)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("stop_at", [3, 4, 7])
def test_interrupted_run_resumes_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    run = {"save_every": 4}
    whole = run_sft(config_for(base, tmp_path / "whole", eval_every=5, run=run), quiet=True)
    cut = config_for(base, tmp_path / "cut", eval_every=5, run=run)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        with pytest.raises(Preempted):
            run_sft(cut, quiet=True)
    stopped = len(metric_lines(tmp_path / "cut"))
    assert 0 < stopped < 12
    resumed = run_sft(cut, quiet=True)
    assert metric_lines(tmp_path / "whole") == metric_lines(tmp_path / "cut")
    tensors, state = checkpoint_contents(tmp_path / "whole")
    again, state_again = checkpoint_contents(tmp_path / "cut")
    assert state == state_again
    assert tensors.keys() == again.keys() >= {"actor", "actor_optimizer", "rng"}
    for file, group in tensors.items():
        assert group.keys() == again[file].keys()
        for name, tensor in group.items():
            assert torch.equal(tensor, again[file][name]), f"{file}/{name}"
    for name, tensor in exported(tmp_path / "whole").items():
        assert torch.equal(tensor, exported(tmp_path / "cut")[name]), name
    assert dataclasses.replace(
        resumed, output_dir=whole.output_dir, model_dir=whole.model_dir
    ) == whole  # fmt: skip


def test_run_killed_before_its_first_checkpoint_starts_over(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path / "cut")
    with open_run(config, "sft", quiet=True) as run:
        stage = stage_for(config, run)
        stage.state.metrics.log(1, stage.step())
    run_sft(config, quiet=True)
    run_sft(config_for(base, tmp_path / "whole"), quiet=True)
    assert metric_lines(tmp_path / "cut") == metric_lines(tmp_path / "whole")


def test_finished_run_is_not_repeated(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path, max_steps=2)
    first = run_sft(config, quiet=True)
    weights = Path(first.model_dir) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run_sft(config, quiet=True) == first
    assert weights.stat().st_mtime_ns == before


def test_going_back_to_the_end_of_a_shorter_run_evaluates_its_weights(
    base: Path, tmp_path: Path
) -> None:
    """The figures in the checkpoint are those of an earlier step."""
    run = {"save_every": 1, "keep_last": 4}
    run_sft(config_for(base, tmp_path / "known", max_steps=4, eval_every=1, run=run), quiet=True)
    known = metric_lines(tmp_path / "known")
    out = tmp_path / "out"
    run_sft(config_for(base, out, max_steps=4, eval_every=2, run=run), quiet=True)
    back = config_for(base, out, max_steps=3, eval_every=2, run=run | {"resume_step": 3})
    result = run_sft(back, quiet=True)
    assert (result.steps, result.eval_loss) == (3, known[2]["loss/eval"])


def test_changed_data_is_refused_on_resume(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = demonstrations(60)
    data = DataConfig(train=str(write_rows(tmp_path / "train.jsonl", rows)), max_length=48)
    config = dataclasses.replace(config_for(base, tmp_path / "out"), data=data)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Preempted):
            run_sft(config, quiet=True)
    write_rows(tmp_path / "train.jsonl", rows[1:])
    with pytest.raises(DataError, match="RF2062"):
        run_sft(config, quiet=True)
    allowed = dataclasses.replace(config.run, allow_data_change=True)
    assert run_sft(dataclasses.replace(config, run=allowed), quiet=True).steps == 12


def test_a_step_that_runs_out_of_memory_is_done_again_in_halves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, tokens: int, fits: int) -> tuple[list[dict[str, Any]], int]:
        config = config_for(base, tmp_path / name, max_steps=4, microbatch_tokens=tokens)

        def limited(actor: Any, batch: Any) -> torch.Tensor:
            loss = nll_sum(actor, batch)
            if batch.sequences.ids.numel() > fits and torch.is_grad_enabled():
                loss.backward()  # what it has added is dropped with the rest
                raise torch.OutOfMemoryError("as a device says it")
            return loss

        monkeypatch.setattr(sft, "nll_sum", limited)
        run_sft(config, quiet=True)
        state = checkpoint_contents(tmp_path / name)[1]
        return metric_lines(tmp_path / name), state["extra"]["token_budget"]["tokens"]

    expected, _ = trained("small", 16, 1000)
    found, tokens = trained("large", 64, 16)
    assert tokens == 16
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(EnvironmentFault, match="RF7061"):
        trained("never", 64, 1)


def test_rows_without_response_tokens_are_harmless(base: Path, tmp_path: Path) -> None:
    config = config_for(base, tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        stage = stage_for(config, run)
        empty = SFTExample(torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool), "row")
        assert stage.accumulate([empty], 1) == 0.0
        update = stage.optimizer.step()
        assert update.grad_norm == 0.0
        assert update.applied


@pytest.mark.parametrize("model_type", ["llama", "granite", "opt"])
def test_evaluation_agrees_with_plain_transformers(model_type: str) -> None:
    module = build(model_type).eval()
    examples = [
        SFTExample(torch.randint(4, 37, (n,)), torch.arange(n) >= n // 2, "row") for n in (3, 9, 5)
    ]
    batch = collate_sft(examples)
    nll, hits = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = module(example.ids[None]).logits[0, :-1]
            learnt = example.loss_mask[1:]
            logprobs = logits.log_softmax(-1).gather(1, example.ids[1:, None])[:, 0]
            nll -= float(logprobs[learnt].sum())
            hits += int((logits.argmax(-1) == example.ids[1:])[learnt].sum())
        assert float(nll_sum(Actor(module), batch)) == pytest.approx(nll, rel=1e-5)
        assert int(hit_count(Actor(module), batch)) == hits


def test_bfloat16_computes_over_fp32_masters(base: Path, tmp_path: Path) -> None:
    run = {"dtype": "bfloat16"}
    run_sft(config_for(base, tmp_path / "b", run=run), quiet=True)
    run_sft(config_for(base, tmp_path / "f"), quiet=True)
    for weight in exported(tmp_path / "b").values():
        assert weight.dtype == torch.float32
    half, full = metric_lines(tmp_path / "b"), metric_lines(tmp_path / "f")
    assert half[0]["loss/train"] != full[0]["loss/train"]
    assert half[0]["loss/train"] == pytest.approx(full[0]["loss/train"], rel=0.02)
    assert half[-1]["loss/train"] < 0.9 * half[0]["loss/train"]


def test_conversations_learn_what_the_assistant_says(base: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w9"}]}
        for i in range(4, 30)
    ]
    path = str(write_rows(tmp_path / "chat.jsonl", rows))
    config = config_for(base, tmp_path / "out", max_steps=8)
    template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    data = DataConfig(train=path, max_length=48, chat_template=template)
    config = dataclasses.replace(config, data=data)
    result = run_sft(config, quiet=True)
    lines = metric_lines(tmp_path / "out")
    assert result.eval_loss is None
    assert "held out" not in result.summary()
    # Of "user : w4 assistant : w9 <eos>" the answer and EOS are learnt.
    assert lines[0]["loss_tokens"] == 2 * 16
    assert lines[0]["tokens"] == 7 * 16
    assert lines[-1]["loss/train"] < 0.5 * lines[0]["loss/train"]


def test_mistakes_are_named_before_training(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RF1031.*\n.*model, data\.train, run\.output_dir"):
        run_sft(SFTConfig(), quiet=True)
    small = config_for(base, tmp_path / "a", microbatch_tokens=4)
    with pytest.raises(ConfigError, match="RF1032"):
        run_sft(small, quiet=True)
    rows = [{"prompt": " ".join(["w5"] * 70), "completion": " w6"}]
    data = DataConfig(train=str(write_rows(tmp_path / "long.jsonl", rows)))
    long = dataclasses.replace(config_for(base, tmp_path / "b", microbatch_tokens=4096), data=data)
    with pytest.raises(ModelError, match="RF3050"):
        run_sft(long, quiet=True)
