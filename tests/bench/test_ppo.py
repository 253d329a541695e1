"""The benchmarks of a PPO step: same lengths on both sides, phases that add up, honest verdicts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from bench.figures import figures_of
from bench.page import build_page
from bench.ppo import bench_learning, bench_memory, bench_step, flops, meter, profile_step, trl_step
from bench.ppo.case import PAD, PRESETS, build_models
from bench.ppo.learn_ours import run
from bench.ppo.learn_trl import Contexts, RuleModel
from bench.ppo.learning_task import PRESETS as TASKS
from bench.ppo.learning_task import Curve, supervised_policy
from bench.ppo.side import Side, SideFailed
from rlhf_fast.tasks.gold import gold_reward
from rlhf_fast.tasks.reviews import corpus, prompt_split
from rlhf_fast.tasks.tiny import build_tokenizer

TINY = PRESETS["tiny"]
LONG = replace(TINY, lengths="long-tailed", threads=1)


# ---- lengths ------------------------------------------------------------------------------------


def test_generate_ends_every_row_where_the_case_says() -> None:
    model = build_models(LONG).policy.eval()
    with torch.no_grad():
        model.lm_head.weight[PAD] = 0  # as likely as the others: it is drawn now and then
    trl_step.force_lengths(model, LONG)
    ids = torch.tensor(LONG.prompts())
    torch.manual_seed(0)
    for _ in range(5):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=LONG.most, do_sample=True, top_k=0),
            return_dict_in_generate=True,
            output_scores=True,
        )
        drawn = out.sequences[:, LONG.prompt :] != PAD
        expected = torch.arange(LONG.most) < torch.tensor(LONG.response_lengths())[:, None]
        assert torch.equal(drawn, expected)
        # Probabilities are untouched: scores are the raw logits.
        assert torch.isfinite(torch.stack(out.scores)).all()


# ---- phases -------------------------------------------------------------------------------------


class _Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(meter, "time", clock)
    peaks = iter(range(100, 10_000, 100))
    stand_in = SimpleNamespace(reset_peak=lambda: None, peak=lambda: next(peaks))
    monkeypatch.setattr(meter, "resident", stand_in)
    return clock


def test_phases_add_up_to_the_step(clock: _Clock) -> None:
    watch = meter.Meter(base=10)
    clock.now = 50.0
    watch.begin()
    clock.now += 1
    with watch.phase("generate"):
        clock.now += 2
        with watch.phase("score"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    found = watch.end()
    assert found["seconds"] == {"rest": 17, "generate": 10, "score": 4, "step": 31}
    assert found["cpu_seconds"] == 62
    # Peaks in the order in which phases were left: 100, 200, ... less the base.
    assert found["extra_bytes"] == {"rest": 490, "generate": 390, "score": 290, "step": 490}


def test_the_phases_of_trl_begin_where_it_calls(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the calls of its `train()` in their order; each takes a second."""
    from contextlib import contextmanager

    def second(*_: Any) -> int:
        clock.now += 1
        return 0

    @contextmanager
    def unwrap(*_: Any) -> Any:
        yield "model"

    names = SimpleNamespace(unwrap_model_for_generation=unwrap, gc=SimpleNamespace(collect=second))
    for module in ("trl", "trl.experimental", "trl.experimental.ppo"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules["trl.experimental.ppo"], "ppo_trainer", names, raising=False)
    accelerator = SimpleNamespace(accumulate=second, gather_for_metrics=second)
    trainer = SimpleNamespace(accelerator=accelerator, log=lambda metrics: None)
    watch, trend = meter.Meter(0), dict[str, float]()
    trl_step.watch(trainer, watch, trend)
    watch.begin()
    with names.unwrap_model_for_generation() as model:
        assert model == "model"
        second()
    second()
    second()
    names.gc.collect()
    second()
    for _ in range(4):
        accelerator.accumulate()
        second()
    accelerator.gather_for_metrics(1.0)
    trainer.log(dict.fromkeys(trl_step.TREND.values(), 3.0))
    names.gc.collect()
    second()
    seconds = watch.end()["seconds"]
    assert seconds == {
        "rest": 2, "generate": 1, "score": 2, "gc": 2, "prepare": 1, "update": 8, "step": 16,
    }  # fmt: skip
    assert trend == dict.fromkeys(trl_step.TREND, 3.0)


# ---- sides --------------------------------------------------------------------------------------

CHILD = """
import sys
from bench.ppo.side import Turns
turns = Turns()
print("what a library prints")
turns.tell({"ready": True})
count = 0
while turns.wait():
    count += 1
    if count == int(sys.argv[1]):
        raise SystemExit("out of luck")
    turns.tell({"step": count})
"""


def test_a_side_steps_when_told_and_says_why_it_failed(tmp_path: Path) -> None:
    with Side("child", ["-c", CHILD, "3"], tmp_path / "log", threads=1) as side:
        assert side.facts == {"ready": True}
        assert [side.step()["step"], side.step()["step"]] == [1, 2]
        with pytest.raises(SideFailed, match=r"child ended early(?s:.)*out of luck"):
            side.step()
    assert "what a library prints" in (tmp_path / "log").read_text()


# ---- verdicts -----------------------------------------------------------------------------------


def test_flops_are_those_of_the_forward() -> None:
    policy = build_models(TINY).policy
    policy.set_attn_implementation("eager")  # whose products the counter sees
    with FlopCounterMode(display=False) as counter:
        policy(input_ids=torch.tensor(TINY.prompts()))
    rows = TINY.episodes * TINY.prompt
    pairs = TINY.prompt * (TINY.prompt - 1) // 2 * TINY.episodes  # that no causal token attends to
    full = flops.trunk(TINY, [TINY.prompt] * TINY.episodes) + flops.head(TINY, rows)
    assert counter.get_total_flops() == full + 4 * TINY.layers * TINY.hidden * pairs
    step = flops.of_step(TINY)
    assert step["step"] == step["generate"] + step["score"] + step["update"]


def _trend(shift: float, wobble: float) -> list[dict[str, float]]:
    keys = bench_step.TREND
    return [dict.fromkeys(keys, 1 / (t + 1) + shift + wobble * (-1) ** t) for t in range(12)]


@pytest.mark.parametrize(("shift", "wobble", "same"), [(0, 0.05, True), (0.1, 0.02, False)])
def test_trends_that_differ_fail_the_gate(shift: float, wobble: float, same: bool) -> None:
    wrong = bench_step.disagreements(_trend(shift, wobble), _trend(0, 0))
    assert (wrong == []) is same
    broken = [dict.fromkeys(bench_step.TREND, math.nan)] * 12
    assert len(bench_step.disagreements(broken, _trend(0, 0))) == len(bench_step.GATED)


def test_a_side_that_did_something_else_gets_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"seconds": {"step": 1.0}, "extra_mib": {"step": 10.0}}
    slow = {"seconds": {"step": 3.0}, "extra_mib": {"step": 40.0}}
    rows = {"ours": row, "ours, rollout": row, "trl": slow}
    gate = {"ours": [], "ours, rollout": ["kl differs by 1, limit 0.1"]}
    bench_step.print_ratios({"case": {"lengths": "fixed"}, "rows": rows, "gate": gate})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ours: 3.00 times as fast as TRL (target 2.2), 1/4.00 of")
    assert second == "ours, rollout: error gate: kl differs by 1, limit 0.1"


# ---- learning -----------------------------------------------------------------------------------

POINTS = [(1.0, 10, 0.0), (2.0, 20, 1.0), (3.0, 30, 2.0), (4.0, 40, 3.0)]


def test_rewards_are_compared_at_equal_tokens() -> None:
    assert bench_learning.reward_within(POINTS, 35) == 2.0
    assert bench_learning.seconds_to(POINTS, 1.5) == 3.0
    assert bench_learning.seconds_to(POINTS, 9.0) == math.inf
    fast = [{"points": POINTS, "seconds": 5.0}]
    short = [{"points": POINTS[:3], "seconds": 9.0}]
    rows = bench_learning.summaries({"ours": fast, "trl": short})
    assert rows["ours"]["reward"] == rows["trl"]["reward"] == 2.0
    assert rows["trl"]["seconds"] == 9.0


def test_intervals_are_students() -> None:
    mean, half = bench_learning.interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 2)) == (2.0, round(4.30 / math.sqrt(3), 2))


def test_learning_has_figures_and_a_curve(tmp_path: Path) -> None:
    runs = {
        side: [{"points": [[slow, 10, 0.5], [2 * slow, 20, top]], "seconds": 2 * slow}] * 2
        for side, slow, top in (("ours", 1.0, 1.5), ("trl", 3.0, 1.25))
    }
    found = {"algorithm": "rloo", "rows": bench_learning.summaries(runs), "runs": runs}
    report = {"environment": {}, "algorithms": [found]}
    ours, seconds, *_ = figures_of(report)
    assert (ours.case, ours.value, ours.low) == ("rloo, ours", 1.5, 1.5)
    assert (seconds.what, seconds.value) == ("seconds to the worse side's reward", 2.0)
    out = build_page({"learning": report}, [], {}, "cpu", tmp_path / "report.html")
    shown = out.read_text(encoding="utf-8")
    assert "rloo: mean reward of a batch over 2 seeds" in shown
    assert "seconds of training" in shown


def test_the_rule_as_a_module_says_what_the_rule_says() -> None:
    tokenizer = build_tokenizer()
    prompts = prompt_split()[0][:3]
    texts = [row["completion"].strip() for row in corpus(prompts, 3, seed=1)]
    ids = tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"]
    tokenizer.padding_side = "right"
    answers = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    rule = RuleModel(Curve(tokenizer))
    rule.curve.start()
    assert list(Contexts([{"input_ids": ids}], rule)) == [{"input_ids": ids}]
    scores = rule.score(rule.trunk(torch.cat([ids, answers], 1)).hidden_states[-1])
    expected = torch.tensor(gold_reward(prompts, texts))
    assert len(expected.unique()) == 3
    assert torch.equal(scores, expected[:, None, None].expand_as(scores))
    assert rule.curve.points[0][1] == int((answers != tokenizer.pad_token_id).sum())


def test_a_run_of_ours_leaves_a_curve(tmp_path: Path) -> None:
    case = replace(TASKS["tiny"], algorithm="rloo", threads=1)
    found = run(replace(case, model=supervised_policy(case, tmp_path))).points
    assert len(found) == case.steps
    assert found[0][0] < found[1][0]
    assert found[0][1] < found[1][1] <= case.steps * case.episodes * case.response


# ---- the smallest presets -----------------------------------------------------------------------


def test_the_profile_accounts_for_every_phase() -> None:
    found = profile_step.profile_step(replace(TINY, threads=1))
    assert set(found) == set(profile_step.PHASES)
    assert found["update"]["products"] > 0
    assert found["update"]["layers"] > 0
    assert found["update"]["optimizer"] > 0
    assert sum(found["generate"].values()) > 0


@pytest.mark.slow
def test_the_smallest_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    arguments = ["--preset", "tiny", "--rounds", "1", "--steps", "2", "--warmups", "1"]
    arguments += ["--lengths", "long-tailed", "--threads", "1", "--json", str(path)]
    code = bench_step.main(arguments)
    assert any(figure.ours for figure in figures_of(json.loads(path.read_text())))
    [found] = json.loads(path.read_text())["cases"]
    assert code == int(any(found["gate"].values()))
    assert found["tokens"] == sum(LONG.response_lengths())
    # Without TRL its absence is said, and all else is measured.
    assert ("trl" in found["rows"]) is not ("pip install trl==1.12.0" in str(found["absent"]))
    assert {*bench_step.OURS, "generate"} <= set(found["rows"])
    for name in bench_step.OURS:
        row = found["rows"][name]
        assert row["seconds"]["step"] > row["seconds"]["update"] > 0
        assert row["extra_mib"]["step"] > 0
        assert len(found["trend"][name]) == 3
    assert "long-tailed lengths" in capsys.readouterr().out


@pytest.mark.slow
def test_the_smallest_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    arguments = ["--preset", "tiny", "--threads", "1", "--json", str(path)]
    assert bench_memory.main(arguments) == 0
    assert figures_of(json.loads(path.read_text()))
    modes = {found["mode"]: found for found in json.loads(path.read_text())["modes"]}
    assert set(modes) == {"naive", "full", "shared"}
    for found in modes.values():
        assert found["worst"] < bench_memory.TOLERANCE
        assert {"generate", "score", "update"} <= set(found["resident_peak"])
    held = {m: sum(bench_memory.sums(modes[m], "held")["load"].values()) for m in modes}
    assert held["shared"] < held["naive"]


@pytest.mark.slow
def test_the_smallest_learning(tmp_path: Path) -> None:
    path = tmp_path / "learning.json"
    arguments = ["--preset", "tiny", "--threads", "1", "--seeds", "1", "--algorithms", "grpo"]
    assert bench_learning.main([*arguments, "--json", str(path)]) == 0
    assert any(figure.ours for figure in figures_of(json.loads(path.read_text())))
    [found] = json.loads(path.read_text())["algorithms"]
    assert ("trl" in found["rows"]) is not ("pip install trl==1.12.0" in str(found["absent"]))
    assert len(found["runs"]["ours"][0]["points"]) == TASKS["tiny"].steps
