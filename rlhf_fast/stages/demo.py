"""`rlhf-fast demo`: the three stages on the reviews task, and what they teach about RLHF.

The demo calls the same stages with the same kind of config as any other run, each in a folder of
its own, so an interrupted demo goes on where it stopped. A rule-based judge plays the human: the
reward model learns from its noisy preferences, and no stage of training sees its scores.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.config import EvalConfig, PPOConfig, to_dict
from rlhf_fast.config_loading import require_valid
from rlhf_fast.environment import collect
from rlhf_fast.errors import CheckpointError
from rlhf_fast.metrics import METRICS_NAME, read_metrics
from rlhf_fast.models.export import export_model
from rlhf_fast.models.reward_function import completion_texts
from rlhf_fast.ppo.trainer import StepOutput
from rlhf_fast.stages import demo_plan
from rlhf_fast.stages.demo_plan import KL_COEF, Plan
from rlhf_fast.stages.evaluate import EvalResult, run_evaluate
from rlhf_fast.stages.evaluate_files import SAMPLES_NAME
from rlhf_fast.stages.messages import say
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.reward_model import RewardModelResult, run_reward_model
from rlhf_fast.stages.run_files import read_json, write_json
from rlhf_fast.stages.sft import run_sft
from rlhf_fast.tasks.demo_results import (
    DEMO_RESULTS_NAME,
    DemoResults,
    Point,
    RewardModelFacts,
    SampleTriple,
    findings,
)
from rlhf_fast.tasks.gold import gold_scores, label_ceiling, preference_rows
from rlhf_fast.tasks.reviews import write_datasets, write_jsonl
from rlhf_fast.tasks.tiny import build_model, build_tokenizer

DEMO_FILE = "demo.json"
PPO_NAME, NO_KL_NAME = "ppo", "ppo_without_kl"
STEPS_A_POINT = 5
SAMPLE_TRIPLES = 3


def run_demo(
    folder: Path, *, seed: int = 1, quick: bool = False, overwrite: bool = False
) -> DemoResults:
    """Run all stages, or go on with a demo that was interrupted in `folder`.

    Args:
        folder: everything the demo writes.
        seed: of data, models and sampling.
        quick: about a minute instead of four, without the over-optimised run.
        overwrite: discard an earlier demo in `folder`.

    Raises:
        RLHFError: `folder` holds something else or a demo with other arguments; `seed` is none.
    """
    plan = (demo_plan.quick if quick else demo_plan.full)(folder, seed)
    require_valid(demo_plan.sft(plan, folder, folder))  # the seed, before anything is made with it
    _claim(folder, {"seed": seed, "quick": quick}, overwrite)
    if (folder / DEMO_RESULTS_NAME).exists():
        say([f"this demo has finished before; --overwrite runs it again ({folder})"])
        return DemoResults.load(folder / DEMO_RESULTS_NAME)
    return Demo(plan, quick=quick).run()


def conclusion(results: DemoResults, report: Path) -> tuple[str, bool]:
    """What the demo found, in plain words, and whether the gold score rose as it must."""
    lines = ["", "What happened", ""]
    lines += [f"  * {line}" for line in findings(results)]
    if results.samples:
        sample = results.samples[0]
        lines += ["", f"The same prompt, before and after ({sample.prompt!r}):", ""]
        lines += [f"  SFT           gold {sample.before_gold:5.2f}  {sample.before}"]
        lines += [f"  PPO           gold {sample.after_gold:5.2f}  {sample.after}"]
        if sample.over_optimised:
            lines += [
                f"  PPO, no KL    gold {sample.over_optimised_gold:5.2f}  {sample.over_optimised}"
            ]
    spent = sum(results.stage_seconds.values())
    lines += ["", f"Time: {spent:.0f} s in all; " + _times(results.stage_seconds), "", "Files:", ""]
    lines += [f"  {name:<18}{path}" for name, path in results.files.items()]
    lines += [f"  {'report':<18}{report}", ""]
    verdict = "OK" if results.succeeded else "FAILED"
    lines.append(f"{verdict}: the gold score rose by {results.gold_rise:.2f}.")
    return "\n".join(lines), results.succeeded


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())


def _claim(folder: Path, arguments: dict[str, Any], overwrite: bool) -> None:
    """Make `folder` the demo's own, or refuse it."""
    mark = folder / DEMO_FILE
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            "RF8401", f"{folder} is a file", where="--output", expected="a directory"
        )
    if overwrite and mark.exists():
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise CheckpointError(
            "RF8401",
            f"{folder} is not empty and holds no demo",
            where="--output",
            remedy="choose another folder",
        )
    held = read_json(mark)
    if held is not None and held != arguments:
        raise CheckpointError(
            "RF8402",
            f"{folder} holds a demo with other arguments",
            where=str(mark),
            expected=json.dumps(held),
            remedy="repeat those arguments, choose another --output, or --overwrite",
        )
    if held is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, arguments)


class Demo:
    """The stages in order; each step finds its inputs on disk, where the one before left them."""

    def __init__(self, plan: Plan, *, quick: bool) -> None:
        self.plan = plan
        self.quick = quick
        self.seconds: dict[str, float] = {}
        self.data = write_datasets(
            plan.place("data"), sft_rows=plan.sft_rows, eval_rows=256, seed=plan.seed
        )

    def run(self) -> DemoResults:
        """All stages, then the results on disk."""
        plan = self.plan
        with self._stage("SFT", "learn to write reviews from 16 thousand of them"):
            self._base_model()
            sft = demo_plan.sft(plan, self.data["sft_train"], self.data["sft_eval"])
            say([run_sft(sft).summary()])
        with self._stage("preferences", "the judge compares pairs of the SFT policy's reviews"):
            pairs = self._preferences()
        with self._stage("reward model", "learn to predict the judge from noisy comparisons"):
            config = demo_plan.reward_model(plan, pairs, self.data["sft_eval"])
            judge = run_reward_model(config)
            say([judge.summary()])
        with self._stage("best-of-n", "what the reward model can do without training a policy"):
            start = self._measure("eval_sft", plan.model("sft"), best_of=True)
        with self._stage("PPO", f"raise the reward model's score, KL coefficient {KL_COEF}"):
            ppo, path = self._ppo(PPO_NAME, KL_COEF, plan.ppo_steps)
            end = self._measure("eval_ppo", plan.model(PPO_NAME), best_of=False)
        no_kl: list[Point] = []
        if plan.no_kl_steps:
            with self._stage("PPO without KL", "the warning: the same reward, no leash"):
                _, no_kl = self._ppo(NO_KL_NAME, 0.0, plan.no_kl_steps)
                last = self._measure("eval_without_kl", plan.model(NO_KL_NAME), best_of=False)
                no_kl.append(_point(last, plan.no_kl_steps))
        results = DemoResults(
            seed=plan.seed,
            quick=self.quick,
            kl_coef=KL_COEF,
            sft=_point(start, 0, kl=0.0),
            best_of_n=_best_of_n(start),
            ppo=(*path, _point(end, plan.ppo_steps)),
            over_optimised=tuple(no_kl),
            reward_model=_facts(judge, pairs),
            samples=self._triples(),
            curves=self._curves(),
            stage_seconds=self.seconds,
            phase_seconds=_phase_seconds(plan.place(PPO_NAME)),
            environment=_environment(),
            configs={
                "sft": to_dict(sft),
                "reward_model": to_dict(config),
                "ppo": to_dict(ppo),
            },
            files=self._files(),
        )
        results.save(plan.folder)
        return results

    @contextmanager
    def _stage(self, name: str, purpose: str) -> Iterator[None]:
        say(["", f"== {name}: {purpose}"])
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def _base_model(self) -> None:
        """A random policy and its tokenizer, as a Hugging Face directory."""
        base = self.plan.place("base")
        if not (base / "config.json").exists():
            tokenizer = build_tokenizer()
            export_model(build_model(tokenizer, self.plan.seed), tokenizer, base)

    def _preferences(self) -> Path:
        """Pairs of completions of each training prompt, labelled by the noisy judge."""
        path = self.plan.place("data") / "preferences.jsonl"
        if path.exists():
            return path
        prompts = self.data["prompts_train"]
        count = sum(1 for _ in prompts.open(encoding="utf-8"))
        each = 2 * -(-self.plan.pairs // count)
        config = demo_plan.sample_pairs(self.plan, prompts, each)
        _evaluate(config)
        samples = _read_jsonl(Path(config.run.output_dir) / SAMPLES_NAME)
        first, second = samples[::2], samples[1::2]
        rows = preference_rows(
            [row["prompt"] for row in first],
            [row["response"] for row in first],
            [row["response"] for row in second],
            self.plan.seed,
        )
        return write_jsonl(path, rows)

    def _measure(self, name: str, model: str, *, best_of: bool) -> EvalResult:
        return _evaluate(
            demo_plan.evaluation(self.plan, name, model, self.data["prompts_eval"], best_of=best_of)
        )

    def _ppo(self, name: str, kl_coef: float, steps: int) -> tuple[PPOConfig, list[Point]]:
        """Train, watching the gold score of the rollouts; returns the trajectory."""
        config = demo_plan.ppo(
            self.plan, name, self.data["prompts_train"], kl_coef=kl_coef, steps=steps
        )
        trainer = PPOTrainer(config, on_step=lambda step, output: _watch(trainer, output))
        say([trainer.train().summary()])
        return config, _trajectory(read_metrics(self.plan.place(name) / METRICS_NAME))

    def _triples(self) -> tuple[SampleTriple, ...]:
        """The first held-out prompts with each policy's first response."""
        before = self._first_samples("eval_sft")
        after = self._first_samples("eval_ppo")
        over = self._first_samples("eval_without_kl") if self.plan.no_kl_steps else {}
        prompts = list(before)[:: max(1, len(before) // SAMPLE_TRIPLES)][:SAMPLE_TRIPLES]
        triples = []
        for prompt in prompts:
            first, second, third = before[prompt], after[prompt], over.get(prompt, "")
            golds = gold_scores([prompt] * 3, [first, second, third])
            triples.append(SampleTriple(prompt, first, second, third, golds[0], golds[1], golds[2]))
        return tuple(triples)

    def _first_samples(self, name: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for row in _read_jsonl(self.plan.place(name) / SAMPLES_NAME):
            found.setdefault(row["prompt"], row["response"])
        return found

    def _curves(self) -> dict[str, list[dict[str, Any]]]:
        names = {"sft": "sft", "reward_model": "reward_model", "ppo": PPO_NAME}
        if self.plan.no_kl_steps:
            names["over_optimised"] = NO_KL_NAME
        return {
            key: [dict(row) for row in read_metrics(self.plan.place(name) / METRICS_NAME)]
            for key, name in names.items()
        }

    def _files(self) -> dict[str, str]:
        plan = self.plan
        return {
            "SFT policy": plan.model("sft"),
            "reward model": plan.model("reward_model"),
            "PPO policy": plan.model(PPO_NAME),
            "results": str(plan.folder / DEMO_RESULTS_NAME),
        }


def _evaluate(config: EvalConfig) -> EvalResult:
    result = run_evaluate(config)
    say([result.summary()])
    return result


def _watch(trainer: PPOTrainer, output: StepOutput) -> dict[str, float]:
    """The judge's mean over a rollout; it is logged and enters no loss."""
    rollout = output.experience.scored.rollout
    prompts = [t for t in rollout.prompts.texts for _ in range(rollout.samples_per_prompt)]
    golds = gold_scores(prompts, completion_texts(rollout, trainer.tokenizer))
    return {"gold/mean": sum(golds) / len(golds)}


def _trajectory(rows: list[dict[str, Any]]) -> list[Point]:
    """Means over STEPS_A_POINT steps each, from the metrics of a PPO run."""
    points = []
    for start in range(0, len(rows), STEPS_A_POINT):
        part = rows[start : start + STEPS_A_POINT]

        def mean(name: str, part: list[dict[str, Any]] = part) -> float:
            return sum(float(row[name]) for row in part) / len(part)

        points.append(
            Point(
                kl=max(0.0, mean("objective/kl")),
                proxy=mean("objective/scores"),
                gold=mean("gold/mean"),
                step=int(part[-1]["step"]),
            )
        )
    return points


def _point(result: EvalResult, step: int, kl: float | None = None) -> Point:
    judged = result.estimates["reward_function"]
    return Point(
        kl=max(0.0, result.estimates["kl"].mean) if kl is None else kl,
        proxy=result.estimates["reward_model"].mean,
        gold=judged.mean,
        gold_error=judged.stderr,
        step=step,
    )


def _best_of_n(result: EvalResult) -> tuple[Point, ...]:
    return tuple(
        Point(row["kl"], row["proxy"], row["gold"], row["gold_stderr"], int(row["n"]))
        for row in result.best_of_n
    )


def _facts(judge: RewardModelResult, pairs: Path) -> RewardModelFacts:
    return RewardModelFacts(
        pairs=len(_read_jsonl(pairs)) - judge.eval_pairs,
        accuracy=judge.accuracy or 0.0,
        accuracy_low=judge.accuracy_low or 0.0,
        accuracy_high=judge.accuracy_high or 0.0,
        ceiling=label_ceiling(_read_jsonl(pairs)),
    )


def _phase_seconds(run: Path) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in read_metrics(run / METRICS_NAME):
        for name, value in row.items():
            if name.startswith("time/"):
                phase = name.removeprefix("time/")
                totals[phase] = totals.get(phase, 0.0) + float(value or 0.0)
    return totals


def _environment() -> dict[str, str]:
    facts = collect()
    return {"rlhf_fast": facts["rlhf_fast"], **facts["machine"], **facts["versions"]}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
