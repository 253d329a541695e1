"""`rlhf-fast check`: read a stage's config, data and models as the stage would, and train nothing.

What a stage refuses in them before its first step is refused here with the same message, and
nothing is written. Models are read one after the other, so the largest has to fit, not all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from rlhf_fast.config import (
    EvalConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
    StageConfig,
)
from rlhf_fast.data import (
    DataReport,
    EpochSampler,
    LoadedData,
    load_preferences,
    load_prompts,
    load_sft,
    warn_overlap,
)
from rlhf_fast.engine.path_choice import choose_path
from rlhf_fast.engine.settings import choose_attention_for, engine_settings
from rlhf_fast.models.checks import (
    check_context,
    check_positions,
    check_same_tokenizer,
    check_vocabulary,
)
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.heads import require_classifier
from rlhf_fast.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_fast.models.meta import model_config
from rlhf_fast.models.reward_function import load_reward_function
from rlhf_fast.models.vocabulary import vocabulary_head
from rlhf_fast.ppo.exact_kl import require_exact_kl
from rlhf_fast.ppo.trunk import require_trunk_head
from rlhf_fast.stages.adapted import open_trunk, require_mergeable
from rlhf_fast.stages.device_choice import choose_device
from rlhf_fast.stages.evaluate import choose_prompts
from rlhf_fast.stages.held_out import split_by_prompt
from rlhf_fast.stages.ppo_checks import check_tokenizers
from rlhf_fast.stages.shared_roles import check_adapters
from rlhf_fast.stages.training import (
    compute_type,
    load_options,
    load_stage_tokenizer,
    require_budget,
    require_settings,
)
from rlhf_fast.types import VocabularyHead

Loader = Callable[..., Any]


def check_stage(config: StageConfig) -> str:
    """What the stage would find, in plain lines.

    Raises:
        RLHFError: whatever the stage itself would raise.
    """
    lines = [f"device: {choose_device(config.run)}, {config.run.dtype}"]
    if isinstance(config, SFTConfig):
        require_settings(config, "model", "data.train", "run.output_dir")
        lines += _sft(config)
    elif isinstance(config, RewardModelConfig):
        require_settings(config, "model", "data.train", "run.output_dir")
        lines += _reward_model(config)
    elif isinstance(config, PPOConfig):
        require_settings(config, "actor", "data.train", "run.output_dir")
        lines += _ppo(config)
    else:
        prompts = "data.eval" if config.data.eval else "data.train"
        require_settings(config, "model", prompts, "run.output_dir")
        lines += _evaluation(config)
    return "\n".join([*lines, "check passed: nothing was trained or written"])


def _sft(config: SFTConfig) -> list[str]:
    tokenizer = load_stage_tokenizer(config.model, config.data)
    sources = _training_data(config, tokenizer, load_sft)
    longest = max(data.report.longest for data in sources)
    require_budget(config.microbatch_tokens, longest)
    module = load_causal_lm(config.model, dtype="float32")
    check_vocabulary(tokenizer, module)
    check_positions(module, longest)
    lines = [_described("model", config.model, module), *_adapter(config, module)]
    return [*_lines(*(data.report for data in sources)), *lines]


def _reward_model(config: RewardModelConfig) -> list[str]:
    tokenizer = load_stage_tokenizer(config.model, config.data)
    sources = _training_data(config, tokenizer, load_preferences)
    reports = [data.report for data in sources]
    examples = [example for data in sources for example in data.examples]
    if not config.data.eval:
        split_by_prompt(examples, config.eval_fraction, config.run.seed)
    longest = max(s.numel() for example in examples for s in example.sequences())
    if config.demonstrations:
        options = load_options(config.model, config.data)
        people = load_sft(config.demonstrations, tokenizer, options, name="demonstrations")
        reports.append(people.report)
        longest = max(longest, people.report.longest)
    require_budget(config.microbatch_tokens, max(len(example) for example in examples))
    if config.lora.rank > 0:
        module = load_causal_lm(config.model, dtype="float32")
    else:
        module = load_sequence_classifier(config.model, init_head=config.init_head, dtype="float32")
    check_vocabulary(tokenizer, module)
    check_positions(module, longest)
    lines = [_described("model", config.model, module), *_adapter(config, module)]
    return [*_lines(*reports), *lines]


def _adapter(config: SFTConfig | RewardModelConfig, module: nn.Module) -> list[str]:
    lora = config.lora
    if lora.rank == 0:
        return []
    require_mergeable(config, module)
    layers = open_trunk(module, config.model).shape(lora.rank, lora.alpha, lora.targets).layers
    return [f"adapter: rank {lora.rank} on {len(layers)} layers"]


def _ppo(config: PPOConfig) -> list[str]:
    tokenizer = load_stage_tokenizer(config.actor, config.data)
    options = load_options(config.actor, config.data)
    data = load_prompts(config.data.train, tokenizer, options, split=config.data.split)
    reports, text = [data.report], 0
    EpochSampler(len(data), config.rollout.prompts, config.run.seed, setting="rollout.prompts")
    if config.ptx.coef > 0:
        rows = load_sft(config.ptx.data, tokenizer, options, name="pretraining")
        reports.append(rows.report)
        text = rows.report.longest
        EpochSampler(
            len(rows),
            config.ptx.batch_size,
            config.run.seed,
            setting="ptx.batch_size",
            where="pretraining data",
        )
    critic = config.critic if config.algorithm.estimator == "gae" else ""
    check_tokenizers(tokenizer, reference=config.reference, critic=critic)
    longest, new = max(len(e) for e in data.examples), config.sampling.max_new_tokens
    generates = _generating(config, config.rollout.max_batch, on_trunk=config.lora.rank > 0)
    line, head = _policy(
        *("actor", config.actor, tokenizer, longest, new), text=text, generates=generates
    )
    lines, reference_head = [line], head
    if config.reference:
        line, reference_head = _policy("reference", config.reference, tokenizer, longest, new)
        lines.append(line)
    if config.algorithm.estimator == "gae" and config.lora.rank == 0:
        on_trunk = config.memory.value_head == "actor"
        if on_trunk or not (critic or config.reward.model):  # made of the actor
            where = "memory.value_head=actor" if on_trunk else "the critic, made of the actor"
            require_classifier(type(model_config(config.actor)), where)
    if config.kl.estimator == "exact":
        require_exact_kl(head, reference_head)
    if config.memory.value_head == "actor":
        require_trunk_head(head)
    if critic:
        lines += _judge("critic", critic, tokenizer, longest, new, init_head=True)
    if config.lora.rank > 0:
        lines += check_adapters(config, load_causal_lm(config.actor, dtype="float32"))
    lines += _reward(config.reward, tokenizer, longest, new)
    require_budget(config.microbatch_tokens, max(longest + new, text))
    return lines + _lines(*reports)


def _evaluation(config: EvalConfig) -> list[str]:
    tokenizer = load_stage_tokenizer(config.model, config.data)
    data, examples = choose_prompts(config, tokenizer)
    check_tokenizers(tokenizer, reference=config.reference)
    longest, new = max(len(e) for e in examples), config.sampling.max_new_tokens
    generates = _generating(config, config.max_batch)
    line, _ = _policy("model", config.model, tokenizer, longest, new, generates=generates)
    lines = [line]
    if config.reference:
        lines.append(_policy("reference", config.reference, tokenizer, longest, new)[0])
    lines += _reward(config.reward, tokenizer, longest, new)
    require_budget(config.microbatch_tokens, longest + new)
    return lines + _lines(data.report)


def _training_data(
    config: SFTConfig | RewardModelConfig, tokenizer: Any, load: Loader
) -> list[LoadedData[Any]]:
    data = config.data
    options = load_options(config.model, data)
    train = load(data.train, tokenizer, options, split=data.split)
    if not data.eval:
        return [train]
    held_out = load(data.eval, tokenizer, options, split=data.eval_split, name="eval")
    warn_overlap(train, held_out)
    return [train, held_out]


def _generating(
    config: PPOConfig | EvalConfig, max_batch: int, *, on_trunk: bool = False
) -> Callable[[nn.Module], None]:
    """What refuses a model that the engine would refuse; it may change the model."""
    settings, device = engine_settings(config.engine, max_batch), choose_device(config.run)

    def refuse(module: nn.Module) -> None:
        set_compute_dtype(module, compute_type(config.run))
        if on_trunk and config.run.dtype == "bfloat16":
            module.bfloat16()  # a frozen trunk has no masters
        path, _ = choose_path(module, settings.path)
        if path == "fused":
            choose_attention_for(module, settings, device)

    return refuse


def _policy(
    role: str,
    path: str,
    tokenizer: Any,
    prompt: int,
    response: int,
    *,
    text: int = 0,
    generates: Callable[[nn.Module], None] | None = None,
) -> tuple[str, VocabularyHead | None]:
    """(a line about a causal LM, its head without the numbers in it).

    `text`: PPO-ptx's longest; `generates`: refuses what cannot, if this one is to.
    """
    module = load_causal_lm(path, dtype="float32")
    check_vocabulary(tokenizer, module, role=role)
    check_context(module, prompt, response, role=role)
    check_positions(module, text)
    if generates is not None:
        generates(module)
    head = vocabulary_head(module)
    if head is not None:
        # The weights go with the module: the next one needs their memory.
        head = dataclasses.replace(head, weight=head.weight.to("meta"), bias=None)
    return _described(role, path, module), head


def _judge(
    role: str, path: str, tokenizer: Any, prompt: int, response: int, *, init_head: bool
) -> list[str]:
    module = load_sequence_classifier(path, init_head=init_head, dtype="float32")
    check_vocabulary(tokenizer, module, role=role)
    check_context(module, prompt, response, role=role)
    return [_described(role, path, module)]


def _reward(settings: RewardConfig, tokenizer: Any, prompt: int, response: int) -> list[str]:
    lines = []
    if settings.model:
        lines += _judge(
            "reward model", settings.model, tokenizer, prompt, response, init_head=False
        )
        check_same_tokenizer(tokenizer, load_tokenizer(settings.model))
    if settings.function:
        load_reward_function(settings.function)
        lines.append(f"reward function: {settings.function} can be imported")
    return lines


def _described(role: str, path: str, module: nn.Module) -> str:
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    return f"{role}: {path}, {type(module).__name__}, {millions:,.1f} M parameters"


def _lines(*reports: DataReport) -> list[str]:
    return [line for report in reports for line in report.lines()]
