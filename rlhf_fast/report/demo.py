"""The report of the demo: what rose, what it cost, and what over-optimising looks like."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf_fast.report import html
from rlhf_fast.report.curves import column, keys, metric_chart
from rlhf_fast.report.plots import Axis, Series, bar_chart, line_chart, seconds_text
from rlhf_fast.report.settings import config_part
from rlhf_fast.tasks.demo_results import REQUIRED_RISE, DemoResults, Point, findings

_STAGE_NAMES = {"sft": "SFT", "reward_model": "reward model", "ppo": "PPO"}
_PPO_CHARTS = (
    ("objective/scores", "score of the reward model"),
    ("objective/kl", "KL from SFT, nats per response"),
    ("objective/entropy", "entropy of the policy"),
    ("rollout/length", "response length, tokens"),
    ("policy/clipfrac_avg", "share of clipped tokens"),
    ("val/explained_variance", "variance explained by the critic"),
)
# Metrics worth a chart in stages 1 and 2, by a word in their name.
_TRAINING_WORDS = ("loss", "accuracy", "perplexity")


def build_demo_report(results: DemoResults, out: Path) -> Path:
    """Write the demo's report.

    Args:
        results: figures of the demo.
        out: path of the HTML file; its directory is created if missing.

    Returns:
        `out`.

    Raises:
        EnvironmentFault: RF7901, `out` cannot be written.
    """
    subtitle = (
        f"SFT, reward model and PPO on the reviews task, seed {results.seed}"
        + (", quick variant" if results.quick else "")
        + f", {seconds_text(sum(results.stage_seconds.values()))} of training"
    )
    return html.write_page(
        out,
        html.page(
            "RLHF in three stages",
            subtitle,
            _headline(results),
            html.section("What happened", html.bullets(findings(results))),
            html.section("KL against score", _frontier(results)),
            html.section("The same prompt, three policies", _samples(results)),
            html.section("PPO, step by step", _ppo_curves(results)),
            html.section("Supervised fine-tuning and reward model", _training_curves(results)),
            html.section("Where the time went", _timing(results)),
            html.section("All points of the frontier", _points(results)),
            html.section("Settings", _configs(results)),
            html.section("Environment", _facts(results.environment)),
            html.section("Files", _facts(results.files)),
        ),
    )


def _headline(results: DemoResults) -> str:
    final = results.ppo[-1]
    kind = "good" if results.succeeded else "bad"
    verdict = (
        f"PPO raised the gold score by {results.gold_rise:.2f}."
        if results.succeeded
        else f"PPO did not raise the gold score by {REQUIRED_RISE}: the demo failed."
    )
    entries = [
        (f"{results.sft.gold:.2f}", "gold score after SFT", ""),
        (f"{final.gold:.2f}", f"gold score after PPO, beta {results.kl_coef:g}", kind),
        (f"{final.kl:.1f} nats", "KL per response that PPO spent", ""),
    ]
    if results.best_of_n:
        best = results.best_of_n[-1]
        entries.append((f"{best.gold:.2f}", f"best-of-{best.step} at {best.kl:.1f} nats", ""))
    if results.over_optimised:
        last = results.over_optimised[-1]
        worse = "bad" if last.gold < results.sft.gold else ""
        entries.append((f"{last.gold:.2f}", "gold score without KL penalty", worse))
    return html.paragraph(verdict, f"verdict {kind}") + html.tiles(entries)


def _frontier(results: DemoResults) -> str:
    text = html.paragraph(
        "Each dot is a policy: how far it has moved from SFT (horizontal, square root of the KL)"
        " and how it is judged (vertical). Solid: the gold score, which training never sees."
        " Dashed: the reward model, which training maximises. Where the dashed line rises and the"
        " solid one falls, the reward model is being exploited. The KL of best-of-n is exact,"
        " log n - (n - 1) / n.",
        "quiet",
    )
    near = max(point.kl for point in (*results.best_of_n, *results.ppo, results.sft)) * 1.25
    figures = [_frontier_chart("Up to the KL that PPO spent", results, near)]
    if any(point.kl > near for point in results.over_optimised):
        figures.append(_frontier_chart("The whole way without a KL penalty", results, math.inf))
    return text + html.charts(figures)


def _frontier_chart(title: str, results: DemoResults, kl_limit: float) -> str:
    start = (results.sft,)
    runs = (
        (f"PPO beta {results.kl_coef:g}", start + results.ppo, 1),
        ("PPO beta 0", start + results.over_optimised, 2),
        ("best-of-n", results.best_of_n, 3),
    )
    series = []
    for name, points, colour in runs:
        kept = [point for point in points if point.kl <= kl_limit]
        if len(points) < 2 or not kept:
            continue
        labels = [f"n {p.step}" if name == "best-of-n" else f"step {p.step}" for p in kept]
        series.append(_judged(f"{name}, gold", kept, colour, labels, gold=True))
        series.append(_judged(f"{name}, proxy", kept, colour, labels, gold=False))
    series.append(_judged("SFT, gold", [results.sft], 6, ["start"], gold=True))
    return line_chart(title, series, Axis("square root of KL, sqrt(nats)"), Axis("score"))


def _judged(
    name: str, points: list[Point], colour: int, labels: list[str], *, gold: bool
) -> Series:
    return Series(
        name,
        [(math.sqrt(max(p.kl, 0.0)), p.gold if gold else p.proxy) for p in points],
        colour=colour,
        dashed=not gold,
        markers=True,
        labels=labels,
        errors=[p.gold_error for p in points] if gold else (),
    )


def _samples(results: DemoResults) -> str:
    text = html.paragraph(
        "Held-out prompts. The gold score of each text stands behind it in brackets.", "quiet"
    )
    rows = [
        (
            sample.prompt,
            f"{sample.before.strip()} [{sample.before_gold:.2f}]",
            f"{sample.after.strip()} [{sample.after_gold:.2f}]",
            f"{sample.over_optimised.strip()} [{sample.over_optimised_gold:.2f}]",
        )
        for sample in results.samples
    ]
    header = ("prompt", "SFT", f"PPO, beta {results.kl_coef:g}", "PPO, beta 0: over-optimised")
    body = html.table(header, rows, ("", "text", "text", "text"))
    return text + body if body else ""


def _ppo_curves(results: DemoResults) -> str:
    runs = [
        (f"beta {results.kl_coef:g}", results.curves.get("ppo", [])),
        ("beta 0", results.curves.get("over_optimised", [])),
    ]
    figures = [metric_chart(key, runs, title) for key, title in _PPO_CHARTS]
    return html.charts([figure for figure in figures if figure], small=True)


def _training_curves(results: DemoResults) -> str:
    figures = []
    for run in ("sft", "reward_model"):
        rows = results.curves.get(run, [])
        for key in keys(rows):
            is_curve = len(column(rows, key)) > 1
            if is_curve and any(word in key for word in _TRAINING_WORDS):
                name = _STAGE_NAMES[run]
                figures.append(metric_chart(key, [("", rows)], f"{name}: {key}"))
    facts = results.reward_model
    text = html.paragraph(
        f"The reward model learned from {facts.pairs:,} labelled pairs and picks the preferred text"
        f" in {facts.accuracy:.1%} of held-out pairs, 95 % interval {facts.accuracy_low:.1%} to"
        f" {facts.accuracy_high:.1%}. Labels are noisy on purpose: the judge itself agrees with"
        f" {facts.ceiling:.1%} of them.",
        "quiet",
    )
    return text + html.charts([figure for figure in figures if figure], small=True)


def _timing(results: DemoResults) -> str:
    figures = []
    if results.stage_seconds:
        figures.append(bar_chart("Stages", list(results.stage_seconds.items())))
    if results.phase_seconds:
        title = f"Phases of PPO, beta {results.kl_coef:g}"
        figures.append(bar_chart(title, list(results.phase_seconds.items())))
    return html.charts(figures)


def _points(results: DemoResults) -> str:
    groups = (
        ("SFT", (results.sft,)),
        ("best-of-n", results.best_of_n),
        (f"PPO, beta {results.kl_coef:g}", results.ppo),
        ("PPO, beta 0", results.over_optimised),
    )
    rows = [
        (
            name,
            point.step if name != "SFT" else "",
            f"{point.kl:.2f}",
            f"{point.proxy:.2f}",
            f"{point.gold:.2f}",
            f"{point.gold_error:.2f}" if point.gold_error else "",
        )
        for name, points in groups
        for point in points
    ]
    header = ("policy", "step or n", "KL, nats", "proxy", "gold", "standard error")
    kinds = ("", *["number"] * 5)
    return html.details(f"{len(rows)} points", html.table(header, rows, kinds))


def _configs(results: DemoResults) -> str:
    return "".join(
        f"<h3>{html.escape(_STAGE_NAMES.get(stage, stage))}</h3>{config_part(stage, config)}"
        for stage, config in results.configs.items()
        if config
    )


def _facts(facts: dict[str, str]) -> str:
    return html.table(("what", "value"), list(facts.items()), ("", "code"))
