"""Tiny random models of any causal LM of transformers, by the name of its architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.engine.test_generator import SIZES

_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# A window shorter than the prompts, where an architecture has one.
_WANTED = {**SIZES, **_EXPERTS, "head_dim": 8, "sliding_window": 5}


def known(model_type: str) -> bool:
    """Whether this transformers has the architecture."""
    return model_type in CONFIG_MAPPING


def tiny(model_type: str, **extra: Any) -> Any:
    """The model, two layers of width 32, with whatever of the wanted sizes its config knows."""
    config_class = CONFIG_MAPPING[model_type]
    stock = config_class()
    wanted = {
        name: value
        for name, value in {**_WANTED, **extra}.items()
        if hasattr(stock, name) and not isinstance(getattr(config_class, name, None), property)
    }
    if hasattr(stock, "multi_query"):  # one head, which the other number would contradict
        wanted.pop("num_key_value_heads", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config_class(**wanted)).eval()
    if getattr(module.config, "attn_logit_softcapping", None) is not None:
        module.set_attn_implementation("eager")  # for versions that take SDPA, without the softcap
    return module
