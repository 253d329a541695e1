"""TRL's GRPO and RLOO trainers (1.16) generating with our engine.

    trainer = GRPOTrainer(..., rollout_func=trl_rollout.RolloutFunction())

    trainer = RLOOTrainer(...)      # has no rollout_func; GRPO may be given the engine so, too
    trl_rollout.attach(trainer)
    trainer.train()

The engine reads the parameters that TRL trains where they lie. They stay the objects that they
were, so an optimizer that exists already goes on; there is no copy that could be stale.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.module_forward import unwrapped, why_not_paged
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.patching import require_version
from rlhf_fast.models.forward import kept_in_bf16, set_compute_dtype
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import SamplingParams

_VERSIONS = ("1.16.0",)

# Fields of transformers' generation config that are read, or that change no token.
_READ = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id"}
_HARMLESS = {
    *("pad_token_id", "bos_token_id", "max_length", "transformers_version", "use_cache"),
    *("cache_implementation", "cache_config", "disable_compile", "compile_config"),
    *("prefill_chunk_size", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "trust_remote_code", "renormalize_logits"),
}
_OFF_AT_ONE = {
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale"),
    *("num_beams", "num_beam_groups", "num_return_sequences", "typical_p"),
}
# Forwards that these put on a model compute its logits as the class does.
_TRANSPARENT = {"trl.trainer.utils", "accelerate.utils.operations", "torch.amp.autocast_mode"}


class RolloutFunction:
    """TRL's `rollout_func`, drawing from the trainer's policy with our engine.

    Options are those of the trainer's config. Seeds follow from `args.seed`, the optimizer step and
    the rank, so a run can be repeated; the draws are not those of `torch.Generator`.

    Args:
        settings: how the engine runs.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = EngineSettings() if settings is None else settings
        self.engine: HybridEngine | None = None
        self._calls: dict[bool, tuple[int, int]] = {}

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """One completion for each prompt; TRL repeats a prompt once for each of its generations.

        Returns:
            `prompt_ids`, `completion_ids` (EOS included) and `logprobs` under the distribution that
            was drawn from, after temperature and filters, all as lists of lists.

        Raises:
            EnvironmentFault: as `check`; before the first update if the options are at fault.
        """
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        completion_ids, logprobs = self.complete(trainer, prompt_ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    def complete(
        self, trainer: Any, prompt_ids: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and log-probs of one completion for each prompt, given as ids."""
        model = trainer.model
        with _stock_forward(model):
            if self.engine is None or self.engine.module is not model:
                self.check(trainer)
                self.engine = self._make_engine(trainer)
            sampling = _sampling(trainer)
            seeds = iter(self._seeds(trainer, len(prompt_ids)))
            out = self.engine.complete(
                [
                    Request(prompt, sampling, tuple(next(seeds) for _ in same))
                    for prompt, same in groupby(map(tuple, prompt_ids))
                ]
            )
        lengths = out.lengths.tolist()
        return _rows(out.tokens, lengths), _rows(out.logprobs, lengths)

    def check(self, trainer: Any) -> None:
        """Refuse a trainer that cannot generate with us, or not as its options say.

        Raises:
            EnvironmentFault: RF7301 or RF7302, TRL is missing or of another version; RF7321, naming
                everything that is in the way.
        """
        require_version("trl", _VERSIONS)
        faults = _faults(trainer)
        if faults:
            raise EnvironmentFault(
                "RF7321",
                f"our engine cannot generate for this {type(trainer).__name__}: "
                + "; ".join(faults),
                expected="a text model, whole on each rank, and sampling by temperature, top_k, "
                "top_p and min_p",
                remedy="change what is named, or let TRL generate",
            )

    def _make_engine(self, trainer: Any) -> HybridEngine:
        model = trainer.model
        half = trainer.args.bf16 or kept_in_bf16(model)
        set_compute_dtype(model, "bfloat16" if half else "float32")
        # No version is given: what is copied for a rollout is copied for every rollout.
        return HybridEngine(model, eos_ids=trainer.eos_token_ids, settings=self.settings)

    def _seeds(self, trainer: Any, count: int) -> list[int]:
        """Of the n-th call in this optimizer step: a run that is resumed goes on with the same."""
        training, step = bool(trainer.model.training), int(trainer.state.global_step)
        before, calls = self._calls.get(training, (step, 0))
        calls = calls if before == step else 0
        self._calls[training] = (step, calls + 1)
        rank = trainer.accelerator.process_index
        key = (trainer.args.seed, int(training), step, calls, rank)
        return [derive_seed(*key, i) for i in range(count)]


def attach(trainer: Any, settings: EngineSettings | None = None) -> RolloutFunction:
    """Let a GRPO or RLOO trainer generate with our engine from now on.

    GRPO takes it as its `rollout_func`. RLOO has none: there this trainer's own
    `_generate_single_turn` is replaced, on the object, not on the class.

    Args:
        trainer: `GRPOTrainer` or `RLOOTrainer`.
        settings: how the engine runs.

    Raises:
        EnvironmentFault: as `RolloutFunction.check`; the trainer is as it was.
    """
    rollout = RolloutFunction(settings)
    rollout.check(trainer)
    if getattr(trainer, "rollout_func", None) is not None:
        raise EnvironmentFault(
            "RF7321",
            "our engine cannot generate for this trainer: it has a rollout_func already",
            remedy="leave rollout_func out",
        )
    if hasattr(trainer, "rollout_func"):
        trainer.rollout_func = rollout
        return rollout

    def _generate_single_turn(
        prompt_ids: list[list[int]], _images: None, _multimodal_fields: dict[str, Any]
    ) -> list[list[int]]:
        return rollout.complete(trainer, prompt_ids)[0]

    trainer._generate_single_turn = _generate_single_turn
    return rollout


def _rows(values: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]


# ---- options ------------------------------------------------------------------------------------


def _sampling(trainer: Any) -> SamplingParams:
    config = trainer.generation_config
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=float(config.temperature) if config.do_sample else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p or 0.0,
    )


def _faults(trainer: Any) -> list[str]:
    """What is in the way, in words."""
    trl = importlib.import_module("trl")
    if not isinstance(trainer, (trl.GRPOTrainer, trl.RLOOTrainer)):
        return ["it is neither a GRPOTrainer nor a RLOOTrainer"]
    others = [
        f"{name} is on"
        for name in ("use_vllm", "use_transformers_continuous_batching")
        if getattr(trainer, name)
    ]
    found = [*others, *_model_faults(trainer)]
    if getattr(trainer, "tools", None):
        found.append("tools or environments")
    # With vLLM the trainer has no generation config of transformers.
    return found if trainer.use_vllm else [*found, *_option_faults(trainer)]


def _model_faults(trainer: Any) -> Iterator[str]:
    model = trainer.model
    if trainer._is_vlm:
        yield "a processor of images"
    if trainer.is_deepspeed_enabled:
        yield "DeepSpeed, whose buffers the parameters lie in"
    if trainer.is_fsdp_enabled:
        yield "FSDP"
    elif any(type(p.data) is not Tensor or p.is_meta for p in model.parameters()):
        yield "parameters that are sharded or quantised"
    elif why_not_paged(model) is not None:
        yield str(why_not_paged(model))
    dtype = unwrapped(model).dtype
    if trainer.args.fp16 or dtype not in (torch.float32, torch.bfloat16):
        yield "fp16" if trainer.args.fp16 else f"weights in {dtype}"


def _option_faults(trainer: Any) -> Iterator[str]:
    config = trainer.generation_config
    given = {k: v for k, v in config.to_dict().items() if v is not None}
    # What the trainer leaves open is taken from the model, as `generate` does.
    inherited = unwrapped(trainer.model).generation_config.to_dict()
    inherited = {k: v for k, v in inherited.items() if k not in trainer.generation_kwargs}
    for name, value in (inherited | given).items():
        off = not value or (name in _OFF_AT_ONE and value == 1)
        if name not in _READ | _HARMLESS and not name.startswith("_") and not off:
            yield f"{name}={value}"
    if config.eos_token_id != trainer.eos_token_ids:
        yield f"eos_token_id={config.eos_token_id} beside the trainer's {trainer.eos_token_ids}"
    # None would be transformers' default, which is 50 for top_k.
    yield from (f"{n} is None" for n in ("temperature", "top_k", "top_p") if n not in given)


# ---- the model's forward ------------------------------------------------------------------------


@contextmanager
def _stock_forward(model: nn.Module) -> Iterator[None]:
    """Without forwards that TRL and accelerate have put on the model object.

    A forward of its own keeps a model off the fused path. TRL's head that makes no logits answers
    only to a keyword that generation does not use, and autocast is the engine's own affair.
    """
    parts = {id(p): p for p in (model, getattr(model, "base_model", model), unwrapped(model))}
    taken = [(p, vars(p).pop("forward")) for p in parts.values() if _is_transparent(p)]
    try:
        yield
    finally:
        for part, forward in taken:
            part.forward = forward


def _is_transparent(part: nn.Module) -> bool:
    """Whether a forward of the object itself is its class's under known wrappers."""
    function = vars(part).get("forward")
    if function is None:
        return False
    while (own := getattr(function, "__func__", function)) is not type(part).forward:
        source = getattr(own, "__globals__", {}).get("__name__", type(own).__module__)
        if source not in _TRANSPARENT:
            return False
        function = _wrapped(own)
    return True


def _wrapped(function: Any) -> Any:
    """What a wrapper calls. TRL's names its class's forward, but calls what was there before it."""
    if inspect.isfunction(function):
        before = inspect.getclosurevars(function).nonlocals.get("original_forward")
        if before is not None:
            return before
    return getattr(function, "__wrapped__", None)
