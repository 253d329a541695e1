"""Our engine behind DeepSpeed's rollout interface, `deepspeed.runtime.rollout`.

    from rlhf_fast.integrations import deepspeed_rollout
    rollout = deepspeed_rollout.fast_rollout(model_engine, tokenizer, seed=1)
    batch = rollout.generate(RolloutRequest(prompt_ids, mask), SamplingConfig(max_new_tokens=64))

or, where the engine is chosen by name, `deepspeed_rollout.install()` and then DeepSpeed's own
`build_rollout(RolloutConfig(engine="rlhf_fast"), student_engine=..., tokenizer=...)`.

Generation reads the parameters that training updates, so nothing is pushed: `sync_weights` names
the version. Where DeepSpeed keeps them in flat buffers of its own (ZeRO 1 and 2, mixed precision),
they stay there and the model's modules run, since a second layout would take them away from the
optimizer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError
from rlhf_fast.integrations.patching import Patch, Replacement, Report
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout, SamplingParams

_PACKAGE = "deepspeed.runtime.rollout"
NAME = "rlhf_fast"


class FastRolloutMixin:
    """The interface's methods; `fast_rollout` puts them before DeepSpeed's abstract class.

    Args:
        engine: what `deepspeed.initialize` returned, or a model of transformers.
        tokenizer: of transformers, with a padding or an end token.
        settings: how generation runs; `max_batch` bounds the samples that decode side by side,
            whatever a `SamplingConfig` says of continuous batching.
        seed: every sample is a function of it, the step of the last `sync_weights`, the number of
            calls since then, the rank, the prompt's row and the sample's number.

    Raises:
        GenerationError: RF4043, parameters that ZeRO-3 has partitioned; RF4044, a path that would
            move parameters out of DeepSpeed's buffers; RF4003 to RF4032 as `HybridEngine`.
    """

    name = NAME

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        *,
        settings: EngineSettings | None = None,
        seed: int = 0,
    ) -> None:
        module = engine.module if hasattr(engine, "module") else engine
        settings = EngineSettings() if settings is None else settings
        self.seed = seed
        self.step = 0
        self.last: Rollout | None = None
        self._calls = 0
        self._pad = _padding_of(tokenizer)
        self._trainer = engine
        settings = _settings_for(engine, module, settings)
        with _without_bookkeeping(engine):
            self._engine: HybridEngine | None = HybridEngine.from_tokenizer(
                module, tokenizer, settings=settings, weight_version=lambda: self.step
            )

    @property
    def engine(self) -> HybridEngine:
        """What generates: its `path` and `reason` say how.

        Raises:
            GenerationError: RF4042 after `shutdown`.
        """
        if self._engine is None:
            raise GenerationError(
                "RF4042", "this rollout engine was shut down", remedy="make another one"
            )
        return self._engine

    def generate(self, request: Any, sampling: Any) -> Any:
        """Draw n samples a prompt, those of prompt 0 first.

        As in DeepSpeed a temperature of 0 or less is greedy and a `top_k` of 0 or less is off. A
        response ends with the tokenizer's end token or one of the model's generation config; it
        keeps that token. `last` holds the same samples with their log-probs and end flags.

        Args:
            request: `RolloutRequest` of B left-padded prompts `[B, P]`.
            sampling: `SamplingConfig` with n samples a prompt.

        Returns:
            `RolloutBatch` on the prompts' device, int64: `input_ids` `[B n, P + R]`, prompts as
            they came and responses padded on the right, R the longest of them; `attention_mask`,
            1 on what is no padding, by lengths and not by ids; `response_start_idx` `[B n]`, P.

        Raises:
            GenerationError: RF4041 prompts that are not left-padded, RF4042 after `shutdown`, and
                those of `HybridEngine.generate`.
        """
        samples = sampling.n_samples_per_prompt
        prompts = _prompts_of(request.prompt_ids, request.prompt_attention_mask)
        with _without_bookkeeping(self._trainer):
            rollout = self.engine.generate(
                prompts,
                _sampling_of(sampling),
                samples_per_prompt=samples,
                seeds=self._seeds(len(prompts), samples),
            )
        self._calls += 1
        self.last = rollout
        return self._batch(request, rollout)

    def sync_weights(self, step: int) -> None:
        """Name the version of the weights, which generation shares with training, `step`."""
        self.step, self._calls = step, 0

    def shutdown(self) -> None:
        """Let go of the engine, its key-value memory and the last rollout; the model stays."""
        self._engine = self._trainer = self.last = None

    def _seeds(self, prompts: int, samples: int) -> list[int]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        key = (self.seed, self.step, self._calls, rank)
        return [derive_seed(*key, row, i) for row in range(prompts) for i in range(samples)]

    def _batch(self, request: Any, rollout: Rollout) -> Any:
        samples = rollout.samples_per_prompt
        ids = request.prompt_ids.to(torch.int64).repeat_interleave(samples, dim=0)
        mask = request.prompt_attention_mask.to(torch.int64).repeat_interleave(samples, dim=0)
        responses = torch.where(rollout.response_mask, rollout.responses, self._pad)
        return importlib.import_module(_PACKAGE).RolloutBatch(
            input_ids=torch.cat([ids, responses], dim=1),
            attention_mask=torch.cat([mask, rollout.response_mask.to(torch.int64)], dim=1),
            response_start_idx=torch.full((len(ids),), request.prompt_ids.shape[1]).to(ids.device),
        )


@functools.cache
def fast_rollout_class() -> type:
    """`FastRolloutMixin` as a subclass of DeepSpeed's `RolloutEngine`, imported now.

    Raises:
        EnvironmentFault: RF7301 to RF7304.
    """
    _PATCH.check()
    base = importlib.import_module(_PACKAGE).RolloutEngine
    return type("FastRollout", (FastRolloutMixin, base), {"__module__": __name__})


def fast_rollout(
    engine: Any, tokenizer: Any, *, settings: EngineSettings | None = None, seed: int = 0
) -> Any:
    """A `RolloutEngine` of DeepSpeed that generates with ours.

    Raises:
        EnvironmentFault: RF7301 to RF7304, DeepSpeed is missing or not the one that was tested.
        GenerationError: see `FastRolloutMixin`, which also describes the arguments.
    """
    return fast_rollout_class()(engine, tokenizer, settings=settings, seed=seed)


# ---- what comes in ------------------------------------------------------------------------------


def _settings_for(engine: Any, module: nn.Module, settings: EngineSettings) -> EngineSettings:
    """The settings, with a path that leaves flat buffers of DeepSpeed alone."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise GenerationError(
            "RF4043",
            "ZeRO-3 has partitioned the parameters that generation is to read",
            expected="whole parameters on every rank: ZeRO 0, 1 or 2",
            remedy="use a lower stage, or DeepSpeed's own hybrid engine",
        )
    optimizer = getattr(engine, "optimizer", None)
    # DeepSpeed's wrappers, all of which flatten, are no optimizers of PyTorch.
    flattened = not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer))
    if flattened and settings.path == "fused":
        raise GenerationError(
            "RF4044",
            f"the parameters lie in buffers of {type(optimizer).__name__}, from which the fused "
            "path would take them away",
            expected="a plain optimizer of PyTorch: no ZeRO, no mixed precision",
            remedy="use path=auto",
        )
    return replace(settings, path="modules") if flattened and settings.path == "auto" else settings


@contextmanager
def _without_bookkeeping(engine: Any) -> Iterator[None]:
    """Generation without the two hooks with which DeepSpeed times and profiles training forwards.

    The fused path runs no module that has hooks, since it cannot know what they do.
    """
    removed = []
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        handle = getattr(engine, name, None)
        if handle is not None:
            hooks = handle.hooks_dict_ref()
            removed.append((hooks, dict(hooks)))
            hooks.pop(handle.id, None)
    try:
        yield
    finally:
        for hooks, before in removed:
            hooks.clear()
            hooks.update(before)


def _padding_of(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither a padding nor an end token")


def _sampling_of(config: Any) -> SamplingParams:
    return SamplingParams(
        config.max_new_tokens,
        temperature=max(config.temperature, 0.0),
        top_k=max(config.top_k, 0),
        top_p=config.top_p,
    )


def _prompts_of(ids: Tensor, attention_mask: Tensor) -> PromptBatch:
    """Left-padded prompts `[B, P]` without their padding."""
    kept = attention_mask.bool()
    ragged = (kept[:, :-1] & ~kept[:, 1:]).any(dim=1)
    if ragged.any():
        raise GenerationError(
            "RF4041",
            "a prompt has padding after its first token",
            where=f"prompt {int(ragged.nonzero()[0])}",
            expected="left-padded prompts: every mask is zeros, then ones",
            remedy="set tokenizer.padding_side to left",
        )
    rows = len(ids)
    return PromptBatch(
        PackedSequences.from_flat(ids[kept].to(torch.int64), kept.sum(dim=1)),
        uid=tuple(range(rows)),
        rows=({},) * rows,
        texts=("",) * rows,
    )


# ---- DeepSpeed's factory ------------------------------------------------------------------------


def _with_ours(own: Any) -> Any:
    def build_rollout(
        rollout_cfg: Any, student_engine: Any = None, tokenizer: Any = None, **options: Any
    ) -> Any:
        """DeepSpeed's factory, which knows the engine "rlhf_fast" as well.

        Args:
            rollout_cfg: with the name in `engine`.
            student_engine, tokenizer: as `fast_rollout`.
            options: for ours `settings` and `seed`; DeepSpeed ignores its own.
        """
        if rollout_cfg.engine != NAME:
            return own(rollout_cfg, student_engine, tokenizer, **options)
        if student_engine is None or tokenizer is None:
            raise ValueError(f"{NAME} rollout needs both student_engine and tokenizer")
        return fast_rollout(student_engine, tokenizer, **options)

    return build_rollout


_FACTORY: Sequence[Replacement] = (Replacement(_PACKAGE, "build_rollout", _with_ours),)
_PATCH = Patch("deepspeed", {"0.19.8": _FACTORY})


def install() -> Report:
    """Teach DeepSpeed's `build_rollout` the name "rlhf_fast".

    Raises:
        EnvironmentFault: RF7301 to RF7304; the factory is as it was.
    """
    return _PATCH.install()


def patched() -> AbstractContextManager[Report]:
    """`install` for the length of a `with` block."""
    return _PATCH.scoped()


def uninstall() -> None:
    """Give DeepSpeed its factory back."""
    _PATCH.remove()
