"""TRL's GRPO and RLOO trainers in whole runs: on our log-probs, and on our generator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations import trl as adapter
from rlhf_fast.integrations import trl_rollout
from rlhf_fast.models.forward import compute_dtype
from tests.integrations.peers import installed
from tests.integrations.trl_cases import LIMIT, Recorder, online_trainer

NEW = installed("trl", "1.16.0", "1.12.0") == "1.16.0"
only_new = pytest.mark.skipif(not NEW, reason="our generator runs under TRL 1.16")
KINDS = pytest.mark.parametrize("kind", ["GRPO", "RLOO"])


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---- log-probs ----------------------------------------------------------------------------------


@KINDS
def test_training_on_our_logprobs_has_the_same_losses(kind: str, tmp_path: Path) -> None:
    """Three steps of two passes over what TRL sampled, in the second of which ratios are not 1."""
    found = []
    for run in range(2):
        recorder = Recorder()
        trainer = online_trainer(kind, tmp_path / str(run), recorder, num_iterations=2, max_steps=6)
        if run == 1:
            with adapter.patched() as report:
                assert report.replaced
                trainer.train()
        else:
            trainer.train()
        found.append((recorder, weights(trainer)))
    (theirs, their_weights), (ours, our_weights) = found
    assert theirs.completions == ours.completions
    for name in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean"):
        assert len(theirs.series(name)) == 6
        torch.testing.assert_close(ours.series(name), theirs.series(name), rtol=1e-5, atol=1e-5)
    assert max(map(abs, theirs.series("loss"))) > 1e-3
    torch.testing.assert_close(our_weights, their_weights, rtol=1e-4, atol=1e-4)


# ---- our generator ------------------------------------------------------------------------------


@only_new
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPO", {}),
        ("RLOO", {}),
        ("GRPO", {"conversational": True}),
        ("RLOO", {"conversational": True}),
        ("GRPO", {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear")}),
    ],
)
def test_greedy_completions_are_theirs_while_weights_change(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Equal at every step: the engine reads what the optimizer wrote a moment ago."""
    found = []
    for run in range(2):
        recorder = Recorder(ranked=True)
        greedy = {"generation_kwargs": {"do_sample": False}, "max_steps": 4, "learning_rate": 1e-2}
        trainer = online_trainer(kind, tmp_path / str(run), recorder, **greedy, **options)
        if run == 1:
            rollout = trl_rollout.attach(trainer)
        trainer.train()
        found.append(recorder)
    theirs, ours = found
    assert ours.completions == theirs.completions
    assert ours.completions[:8] != ours.completions[-8:]
    torch.testing.assert_close(ours.series("loss"), theirs.series("loss"), rtol=1e-4, atol=1e-4)
    assert rollout.engine is not None
    assert rollout.engine.path == "fused"


@only_new
@KINDS
def test_sampled_runs_are_finite_within_limits_and_repeatable(kind: str, tmp_path: Path) -> None:
    found = []
    for seed in (5, 5, 6):
        recorder = Recorder()
        trainer = online_trainer(kind, tmp_path / "run", recorder, seed=seed, num_iterations=2)
        trl_rollout.attach(trainer)
        trainer.train()
        found.append(recorder)
        for name in ("loss", "reward", "grad_norm"):
            assert torch.tensor(recorder.series(name)).isfinite().all()
        eos = trainer.processing_class.eos_token_id
        for ids in recorder.completions:
            assert 1 <= len(ids) <= LIMIT
            assert eos not in ids[:-1]
        assert {ids[-1] == eos for ids in recorder.completions} == {True, False}
        assert len({tuple(ids) for ids in recorder.completions}) > 12
    assert found[0].completions == found[1].completions
    assert found[0].series("loss") == found[1].series("loss")
    assert found[0].completions != found[2].completions


@only_new
def test_mixed_precision_generates_in_bf16_on_the_fused_path(tmp_path: Path) -> None:
    """Through accelerate's autocast, which lies over TRL's forward on the model."""
    recorder = Recorder()
    trainer = online_trainer("GRPO", tmp_path, recorder, bf16=True)
    rollout = trl_rollout.attach(trainer)
    trainer.train()
    assert torch.tensor(recorder.series("loss")).isfinite().all()
    assert "forward" in vars(trainer.model)
    assert rollout.engine is not None
    assert rollout.engine.path == "fused"
    assert compute_dtype(trainer.model) == "bfloat16"
    assert trainer.model.dtype is torch.float32


@only_new
def test_logprobs_are_of_the_distribution_drawn_from(tmp_path: Path) -> None:
    """Handed to the constructor; temperature and filters come from the trainer's config."""
    rollout = trl_rollout.RolloutFunction()
    options = {"temperature": 0.7, "top_k": 3}
    trainer = online_trainer("GRPO", tmp_path, Recorder(), rollout_func=rollout, **options)
    out = rollout(["review of the film :"] * 16, trainer)
    assert set(out) == {"prompt_ids", "completion_ids", "logprobs"}
    for prompt, ids, logprobs in zip(*out.values(), strict=True):
        with torch.no_grad():
            tokens = torch.tensor([prompt + ids], device=trainer.model.device)
            logits = trainer.model(tokens).logits[0, len(prompt) - 1 : -1].cpu()
        kept = logits.topk(3)
        drawn = torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values / 0.7)
        expected = drawn.log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)


@only_new
def test_a_run_resumed_from_a_checkpoint_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, rest = Recorder(), Recorder()
    for recorder in (whole, rest):
        trainer = online_trainer("GRPO", tmp_path, recorder, **options)
        trl_rollout.attach(trainer)
        trainer.train(resume_from_checkpoint=recorder is rest and str(tmp_path / "checkpoint-2"))
    assert len(rest.completions) == 16
    assert whole.completions[-16:] == rest.completions
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(parameter.cpu(), loaded[name])


@only_new
def test_two_ranks_draw_different_samples_and_keep_equal_weights(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("trl_ranks.py")
    simulated = "simulated_cuda" in sys.modules
    run = subprocess.run(
        [
            *(sys.executable, *launch),
            *(("-m", "tests.simulated_cuda") if simulated else ()),
            *(str(script), str(tmp_path)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "SIMULATED_CUDA_DEVICES": "2"},
        cwd=script.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr  # whole: it ends in the launcher's report
    first, second = (json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2))
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    assert first["weights"] == second["weights"]
    if simulated:
        assert [first["device"], second["device"]] == ["cuda:0", "cuda:1"]
    drawn = {tuple(ids) for ids in first["completions"]}
    assert len(drawn) > 12
    assert not drawn & {tuple(ids) for ids in second["completions"] if len(ids) == LIMIT}


def test_seeds_differ_by_rank_step_and_call() -> None:
    def seeds(rank: int, step: int) -> list[int]:
        trainer = SimpleNamespace(
            args=SimpleNamespace(seed=1),
            model=SimpleNamespace(training=True),
            state=SimpleNamespace(global_step=step),
            accelerator=SimpleNamespace(process_index=rank),
        )
        rollout = trl_rollout.RolloutFunction()
        return rollout._seeds(trainer, 4) + rollout._seeds(trainer, 4)

    drawn = [s for rank in range(2) for step in range(2) for s in seeds(rank, step)]
    assert len(set(drawn)) == len(drawn) == 32


# ---- what it refuses ----------------------------------------------------------------------------


@only_new
@KINDS
def test_every_option_in_the_way_is_named_before_training(kind: str, tmp_path: Path) -> None:
    kwargs = {"no_repeat_ngram_size": 2, "eos_token_id": [5], "top_k": None}
    options = {"repetition_penalty": 1.2, "generation_kwargs": kwargs}
    trainer = online_trainer(kind, tmp_path, Recorder(), **options)
    trainer.is_deepspeed_enabled = True
    trainer.model.generation_config.bad_words_ids = [[7]]
    with pytest.raises(EnvironmentFault) as caught:
        trl_rollout.attach(trainer)
    assert caught.value.code == "RF7321"
    for word in ("repetition_penalty=1.2", *kwargs, "bad_words_ids", "DeepSpeed"):
        assert word in caught.value.what
    assert "top_p" not in caught.value.what
    assert getattr(trainer, "rollout_func", None) is None
    assert "_generate_single_turn" not in vars(trainer)


@only_new
@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching", "_is_vlm"])
def test_other_generators_and_images_are_refused(option: str, tmp_path: Path) -> None:
    trainer = online_trainer("RLOO", tmp_path, Recorder())
    setattr(trainer, option, True)
    with pytest.raises(EnvironmentFault, match="image" if option == "_is_vlm" else option):
        trl_rollout.attach(trainer)


@only_new
def test_tools_and_a_rollout_func_of_its_own_are_refused(tmp_path: Path) -> None:
    trainer = online_trainer("GRPO", tmp_path, Recorder(), rollout_func=lambda *_: {})
    with pytest.raises(EnvironmentFault, match="rollout_func already"):
        trl_rollout.attach(trainer)
    trainer.tools = [len]
    with pytest.raises(EnvironmentFault, match="tools"):
        trl_rollout.attach(trainer)


@only_new
def test_another_trainer_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="neither a GRPOTrainer nor a RLOOTrainer"):
        trl_rollout.attach(SimpleNamespace())


@only_new
def test_a_forward_that_is_not_known_keeps_the_model_off_the_fused_path(tmp_path: Path) -> None:
    """And is called: what it adds to the logits decides what is drawn."""
    trainer = online_trainer("GRPO", tmp_path, Recorder(), generation_kwargs={"do_sample": False})
    before = trainer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = before(*args, **kwargs)
        out.logits[..., 7] += 1e4
        return out

    trainer.model.forward = forward
    rollout = trl_rollout.attach(trainer)
    out = rollout(["review of the film :"], trainer)
    assert out["completion_ids"] == [[7] * LIMIT]
    assert rollout.engine is not None
    assert rollout.engine.path == "modules"
    assert trainer.model.forward is forward
