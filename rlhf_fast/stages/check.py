"""`rlhf-fast check`: read a stage's config, data and models as the stage would, and train nothing.

Everything that a stage refuses before its first step is refused here with the same message, and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_fast.config import EvalConfig, PPOConfig, RewardModelConfig, SFTConfig, StageConfig
from rlhf_fast.data import (
    DataReport,
    LoadOptions,
    load_preferences,
    load_prompts,
    load_sft,
    warn_overlap,
)
from rlhf_fast.models.checks import check_context, check_same_tokenizer, check_vocabulary
from rlhf_fast.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_fast.models.reward_function import load_reward_function
from rlhf_fast.stages.training import choose_device, require_settings

Loader = Callable[..., Any]


def check_stage(config: StageConfig) -> str:
    """What the stage would find, in plain lines.

    Raises:
        RLHFError: whatever the stage itself would raise.
    """
    lines = [f"device: {choose_device(config.run)}, {config.run.dtype}"]
    if isinstance(config, SFTConfig):
        require_settings(config, "model", "data.train", "run.output_dir")
        lines += _causal_lm("model", config.model)
        lines += _data(config, load_tokenizer(config.model), load_sft)
    elif isinstance(config, RewardModelConfig):
        require_settings(config, "model", "data.train", "run.output_dir")
        load_sequence_classifier(config.model, init_head=config.init_head, dtype="float32")
        lines.append(f"model: {config.model} can be loaded")
        tokenizer = load_tokenizer(config.model)
        lines += _data(config, tokenizer, load_preferences)
        if config.demonstrations:
            options = LoadOptions.from_config(config.data)
            demonstrations = load_sft(
                config.demonstrations, tokenizer, options, name="demonstrations"
            )
            lines += demonstrations.report.lines()
    elif isinstance(config, PPOConfig):
        require_settings(config, "actor", "data.train", "run.output_dir")
        lines += _ppo(config)
    else:
        require_settings(config, "model", "data.eval", "run.output_dir")
        lines += _evaluation(config)
    return "\n".join([*lines, "check passed: nothing was trained or written"])


def _causal_lm(name: str, path: str, prompt: int = 0, response: int = 0) -> list[str]:
    module, tokenizer = load_causal_lm(path, dtype="float32"), load_tokenizer(path)
    check_vocabulary(tokenizer, module)
    check_context(module, prompt, response)
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    return [f"{name}: {path}, {type(module).__name__}, {millions:,.1f} M parameters"]


def _data(config: StageConfig, tokenizer: Any, load: Loader) -> list[str]:
    data = config.data
    options = LoadOptions.from_config(data)
    train = load(data.train, tokenizer, options, split=data.split)
    reports: list[DataReport] = [train.report]
    if data.eval:
        held_out = load(data.eval, tokenizer, options, split=data.eval_split, name="eval")
        warn_overlap(train, held_out)
        reports.append(held_out.report)
    return [line for report in reports for line in report.lines()]


def _reward(config: PPOConfig | EvalConfig, tokenizer: Any) -> list[str]:
    lines = []
    if config.reward.model:
        load_sequence_classifier(config.reward.model, init_head=False, dtype="float32")
        check_same_tokenizer(tokenizer, load_tokenizer(config.reward.model))
        lines.append(f"reward model: {config.reward.model} can be loaded")
    if config.reward.function:
        load_reward_function(config.reward.function)
        lines.append(f"reward function: {config.reward.function} can be imported")
    return lines


def _ppo(config: PPOConfig) -> list[str]:
    tokenizer = load_tokenizer(config.actor)
    lines = _causal_lm(
        "actor", config.actor, config.data.max_prompt_length, config.sampling.max_new_tokens
    )
    if config.reference:
        lines += _causal_lm("reference", config.reference)
        check_same_tokenizer(tokenizer, load_tokenizer(config.reference), names="actor, reference")
    if config.critic:
        load_sequence_classifier(config.critic, init_head=True, dtype="float32")
        lines.append(f"critic: {config.critic} can be loaded")
    lines += _reward(config, tokenizer) + _data(config, tokenizer, load_prompts)
    if config.ptx.coef > 0:
        options = LoadOptions.from_config(config.data)
        lines += load_sft(config.ptx.data, tokenizer, options, name="pretraining").report.lines()
    return lines


def _evaluation(config: EvalConfig) -> list[str]:
    tokenizer = load_tokenizer(config.model)
    lines = _causal_lm("model", config.model, 0, config.sampling.max_new_tokens)
    if config.reference:
        lines += _causal_lm("reference", config.reference)
    lines += _reward(config, tokenizer)
    data = config.data
    options = LoadOptions.from_config(data)
    prompts = load_prompts(data.eval, tokenizer, options, split=data.eval_split, name="evaluation")
    return lines + prompts.report.lines()
