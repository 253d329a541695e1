"""rlhf_fast: PPO for language models, fast, correct and affordable.

    from rlhf_fast import PPOConfig, PPOTrainer

The names below are imported when first asked for, so that `import rlhf_fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.config import (
        AlgorithmConfig,
        DataConfig,
        EngineConfig,
        EvalConfig,
        KLConfig,
        MemoryConfig,
        OptimConfig,
        PPOConfig,
        PtxConfig,
        RewardConfig,
        RewardModelConfig,
        RolloutConfig,
        RunConfig,
        SamplingConfig,
        SFTConfig,
    )
    from rlhf_fast.config_distributed import DistributedConfig
    from rlhf_fast.config_lora import AdapterConfig, LoraConfig
    from rlhf_fast.errors import RLHFError
    from rlhf_fast.stages.evaluate import run_evaluate
    from rlhf_fast.stages.ppo import PPOTrainer, run_ppo
    from rlhf_fast.stages.reward_model import run_reward_model
    from rlhf_fast.stages.sft import run_sft

__version__ = "0.1.0"

_CONFIGS = (
    "AlgorithmConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "KLConfig",
    "MemoryConfig",
    "OptimConfig",
    "PPOConfig",
    "PtxConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
)
_HOMES = dict.fromkeys(_CONFIGS, "rlhf_fast.config") | {
    "AdapterConfig": "rlhf_fast.config_lora",
    "DistributedConfig": "rlhf_fast.config_distributed",
    "LoraConfig": "rlhf_fast.config_lora",
    "PPOTrainer": "rlhf_fast.stages.ppo",
    "RLHFError": "rlhf_fast.errors",
    "run_evaluate": "rlhf_fast.stages.evaluate",
    "run_ppo": "rlhf_fast.stages.ppo",
    "run_reward_model": "rlhf_fast.stages.reward_model",
    "run_sft": "rlhf_fast.stages.sft",
}

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "DataConfig",
    "DistributedConfig",
    "EngineConfig",
    "EvalConfig",
    "KLConfig",
    "LoraConfig",
    "MemoryConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOTrainer",
    "PtxConfig",
    "RLHFError",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "run_evaluate",
    "run_ppo",
    "run_reward_model",
    "run_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
