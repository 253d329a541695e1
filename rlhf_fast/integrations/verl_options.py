"""What verl may ask of our rollout, and what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_fast.errors import EnvironmentFault, GenerationError
from rlhf_fast.types import SamplingParams

NAME = "rlhf_fast"

#: Options of verl's RolloutConfig and the values of them that we have.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "tensor_model_parallel_size": (1,),
    "data_parallel_size": (1,),
    "pipeline_model_parallel_size": (1,),
    "expert_parallel_size": (1,),
    "repetition_penalty": (1.0,),
    "quantization": (None,),
    "enable_rollout_routing_replay": (False,),
    "logprobs_mode": ("processed_logprobs", None),
}
#: The same of a server.
_SERVED: dict[str, tuple[Any, ...]] = {"scheduling_policy": ("fcfs", None)}

#: Settings of a request that must be off, and what off is.
_OFF: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
    "min_tokens": 0,
    "prompt_logprobs": None,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
}
#: Settings of a request that concern texts, which nobody makes here.
_OF_TEXTS = {
    "detokenize",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}


def refuse(faults: list[str], where: str = "actor_rollout_ref.rollout") -> None:
    """One error for everything that verl asks for and we lack, if there is any.

    Raises:
        EnvironmentFault: RF7331.
    """
    if faults:
        raise EnvironmentFault(
            "RF7331",
            f"the rollout {NAME} lacks what verl asks of it: {'; '.join(faults)}",
            where=where,
            remedy="change these, or use another rollout",
        )


def unsupported(config: Any) -> list[str]:
    """What a `RolloutConfig` asks for and our generator lacks."""
    return _others(config, _SUPPORTED)


def unsupported_of_server(config: Any, model_config: Any) -> list[str]:
    """What a run asks for and our server lacks.

    Args:
        config: verl's `RolloutConfig`.
        model_config: verl's `HFModelConfig`, or the section that becomes one.
    """
    faults = unsupported(config) + _others(config, _SERVED)
    if config.prometheus.enable:
        faults.append("prometheus.enable=True")
    if config.mtp is not None and config.mtp.enable and config.mtp.enable_rollout:
        faults.append("mtp.enable_rollout=True")
    if (config.qat or {}).get("enable", False):
        faults.append("qat.enable=True")
    if config.checkpoint_engine.backend == "delta_sharded":
        faults.append("checkpoint_engine.backend='delta_sharded'")
    lora = model_config.get("lora") or {}
    adapters = max(model_config.get("lora_rank") or 0, lora.get("rank") or 0)
    if adapters > 0 and not lora.get("merge", False):
        faults.append("adapters alone (have model.lora.merge=True)")
    return faults


def _others(config: Any, have: Mapping[str, tuple[Any, ...]]) -> list[str]:
    asked = ((name, getattr(config, name), values) for name, values in have.items())
    return [
        f"{name}={value!r} (have {values[0]!r})"
        for name, value, values in asked
        if value not in values
    ]


def sampling_of(
    asked: Mapping[str, Any], prompt: int, config: Any, limit: int, eos_ids: tuple[int, ...]
) -> SamplingParams:
    """How to draw for one request.

    Args:
        asked: settings by the names of vLLM's `SamplingParams`; what is not there is the config's.
        prompt: tokens of the prompt.
        config: verl's `RolloutConfig`.
        limit: tokens of prompt and response together.
        eos_ids: that end a response, unless `ignore_eos`.

    Raises:
        EnvironmentFault: RF7331, a setting that our generator lacks.
        GenerationError: RF4006, the prompt leaves no room for a token.
    """
    elsewhere = (*_OF_TEXTS, "logprobs", "seed")
    rest = {k: v for k, v in asked.items() if k not in elsewhere and v is not None}
    faults = [f"{k}={rest[k]!r} (have {v!r})" for k, v in _OFF.items() if rest.get(k, v) != v]
    rest = {k: v for k, v in rest.items() if k not in _OFF}
    room = limit - prompt
    if room < 1:
        raise GenerationError(
            "RF4006",
            f"a prompt of {prompt} tokens leaves no room to generate within {limit}",
            remedy="shorten or filter prompts, or raise rollout.max_model_len",
        )
    both = config.prompt_length + config.response_length
    tokens = rest.pop("max_new_tokens", min(config.response_length, both - prompt))
    tokens = rest.pop("max_tokens", tokens)
    if tokens < 1:
        faults.append(f"max_tokens={tokens} (have 1 or more)")
    stops = tuple(rest.pop("stop_token_ids", None) or ())
    if not rest.pop("ignore_eos", config.ignore_eos):
        stops = (*eos_ids, *stops)
    texts = rest.pop("stop", None) or ()
    settings = {
        "temperature": float(rest.pop("temperature", config.temperature)),
        "top_k": max(0, rest.pop("top_k", config.top_k)),
        "top_p": float(rest.pop("top_p", config.top_p)),
        "min_p": float(rest.pop("min_p", 0.0)),
    }
    faults += [f"{name}={value!r}" for name, value in rest.items()]
    refuse(faults, where="sampling_params")
    return SamplingParams(
        max(1, min(tokens, room)),
        stop_token_ids=tuple(dict.fromkeys(stops)),
        stop_strings=(texts,) if isinstance(texts, str) else tuple(texts),
        **settings,
    )
