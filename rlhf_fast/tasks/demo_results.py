"""What a run of the demo found, as plain data: written by the stage, read by the report.

`demo_results.json` is one JSON object with the fields of `DemoResults`; nested dataclasses become
objects, numbers that are not finite become null (JSON has no NaN). A reader gets NaN back where a
number is required.

The frontier compares policies by KL from the SFT policy in nats per sequence, by the reward model's
score (`proxy`, in standard deviations of the SFT policy's scores when the reward model was
calibrated to unit gain) and by the gold score that no stage of training has seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.errors import DataError

DEMO_RESULTS_NAME = "demo_results.json"

#: The demo fails if PPO does not raise the gold score over SFT by this much.
REQUIRED_RISE = 0.8


@dataclass(frozen=True)
class Point:
    """One policy on the frontier.

    Attributes:
        kl: KL(policy || SFT) in nats per sequence; for best-of-n log n - (n - 1) / n.
        proxy: mean score of the reward model.
        gold: mean gold score.
        gold_error: standard error of `gold`.
        step: PPO step, or n of best-of-n.
    """

    kl: float
    proxy: float
    gold: float
    gold_error: float = 0.0
    step: int = 0


@dataclass(frozen=True)
class RewardModelFacts:
    """Held-out accuracy with its 95 % interval, and the accuracy of the noise-free judge."""

    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    ceiling: float


@dataclass(frozen=True)
class SampleTriple:
    """Responses of the three policies to one held-out prompt, with their gold scores."""

    prompt: str
    before: str
    after: str
    over_optimised: str
    before_gold: float
    after_gold: float
    over_optimised_gold: float


@dataclass(frozen=True)
class DemoResults:
    """All figures of the demo.

    Attributes:
        seed: seed of the whole demo.
        quick: True for the short variant.
        kl_coef: beta of the regularised run.
        sft: the SFT policy; its KL is 0.
        best_of_n: best-of-n from the SFT policy, n rising.
        ppo: trajectory at `kl_coef`; the last point is the exported policy.
        over_optimised: trajectory at beta 0.
        reward_model: facts of stage 2.
        samples: responses before, after, and over-optimised.
        curves: rows of `metrics.jsonl` by run: `sft`, `reward_model`, `ppo`, `over_optimised`.
        stage_seconds: wall seconds by stage, in the order they ran.
        phase_seconds: seconds by phase of a PPO step, summed over the run at `kl_coef`.
        environment: facts about machine and software, in words.
        configs: configuration by stage, `sft`, `reward_model`, `ppo`, as nested mappings.
        files: what the demo left on disk, by description.
    """

    seed: int
    quick: bool
    kl_coef: float
    sft: Point
    best_of_n: tuple[Point, ...]
    ppo: tuple[Point, ...]
    over_optimised: tuple[Point, ...]
    reward_model: RewardModelFacts
    samples: tuple[SampleTriple, ...] = ()
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def gold_rise(self) -> float:
        """Gold score of the exported policy minus that of SFT."""
        return self.ppo[-1].gold - self.sft.gold

    @property
    def succeeded(self) -> bool:
        """Whether the gold score rose by at least `REQUIRED_RISE`; False if it is not finite."""
        return REQUIRED_RISE <= self.gold_rise < math.inf

    def save(self, folder: Path) -> Path:
        """Write `demo_results.json` into `folder` and return its path."""
        path = folder / DEMO_RESULTS_NAME
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(to_jsonable(self), allow_nan=False, indent=1), "utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> DemoResults:
        """Read what `save` wrote.

        Raises:
            DataError: RF2921, the file is missing or is not what `save` writes.
        """
        try:
            tree = json.loads(path.read_text("utf-8"))
            results: DemoResults = _build(cls, tree)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                "RF2921",
                f"cannot read the results of a demo: {error}",
                where=str(path),
                expected=f"{DEMO_RESULTS_NAME} of this version",
                remedy="run `rlhf-fast demo` again",
            ) from error
        return results


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses, tuples and numbers that are not finite into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _build(kind: Any, value: Any) -> Any:
    """Build an instance of `kind`, a dataclass, tuple[X, ...], number or other, from JSON."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got {value!r:.60}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_build(inner, item) for item in value)
    if kind is float:
        return math.nan if value is None else float(value)
    expected = typing.get_origin(kind) or kind
    if not isinstance(value, expected):
        raise TypeError(f"expected {expected.__name__}, got {value!r:.60}")
    return value


def interpolated_gold(curve: tuple[Point, ...], kl: float) -> float:
    """Gold score of a frontier at `kl`, linear in sqrt(KL); NaN outside the range it covers.

    Along sqrt(KL) both best-of-n and RL frontiers are close to parabolas (Gao et al. 2022), so a
    straight line between neighbours errs little there.
    """
    points = sorted(curve, key=lambda point: point.kl)
    for left, right in itertools.pairwise(points):
        if left.kl <= kl <= right.kl:
            width = math.sqrt(right.kl) - math.sqrt(left.kl)
            part = (math.sqrt(kl) - math.sqrt(left.kl)) / width if width else 0.0
            return left.gold + part * (right.gold - left.gold)
    return math.nan


def findings(results: DemoResults) -> list[str]:
    """The demo's conclusion in plain sentences, for the screen and the report alike."""
    final, start = results.ppo[-1], results.sft
    lines = [
        f"The gold score, which no stage of training has seen, went from {start.gold:.2f} after SFT"
        f" to {final.gold:.2f} after PPO ({results.gold_rise:+.2f}; the demo asks for at least"
        f" {REQUIRED_RISE:+.1f}).",
        f"It cost {final.kl:.1f} nats of KL per response from the SFT policy, at a KL coefficient"
        f" of {results.kl_coef:g}.",
        _against_best_of_n(results),
        f"The reward model picks the preferred text in {results.reward_model.accuracy:.0%} of"
        f" held-out pairs (95 % interval {results.reward_model.accuracy_low:.0%} to"
        f" {results.reward_model.accuracy_high:.0%}); the judge behind the noisy labels would reach"
        f" {results.reward_model.ceiling:.0%}.",
    ]
    if results.over_optimised:
        lines.append(_over_optimisation(results))
    return [line for line in lines if line]


def _against_best_of_n(results: DemoResults) -> str:
    if not results.best_of_n:
        return ""
    final, last = results.ppo[-1], results.best_of_n[-1]
    text = (
        f"Best-of-{last.step} draws {last.step} samples for one answer and reaches {last.gold:.2f}"
        f" at {last.kl:.1f} nats; PPO draws one."
    )
    same_kl = interpolated_gold(results.best_of_n, final.kl)
    if math.isfinite(same_kl):
        text += f" At PPO's own KL, best-of-n stands at {same_kl:.2f}, PPO at {final.gold:.2f}."
    return text


def _over_optimisation(results: DemoResults) -> str:
    start, last = results.sft, results.over_optimised[-1]
    peak = max((start, *results.over_optimised), key=lambda point: point.gold)
    text = (
        f"Without the KL penalty the reward model's score rises to {last.proxy:.1f} (with it:"
        f" {results.ppo[-1].proxy:.1f}), while the gold score goes from {start.gold:.2f} over"
        f" {peak.gold:.2f} to {last.gold:.2f}"
    )
    if last.gold < start.gold:
        return (
            text + ", below where it started: the policy has learned to please the judge it sees."
        )
    return text + "."
