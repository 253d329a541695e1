"""Every op in plain PyTorch: the specification, and the oracle of tests and benchmarks.

Computed in fp32, or in fp64 when an input is fp64. Written to be read; runs on every device.
"""

from rlhf_fast_kernels.reference.common import KL_ESTIMATORS, kl_estimate, output_dtype
from rlhf_fast_kernels.reference.kl_from_logits import kl_from_logits
from rlhf_fast_kernels.reference.linear import linear_kl, linear_logprobs, linear_ppo_loss
from rlhf_fast_kernels.reference.logprobs_from_logits import logprobs_from_logits
from rlhf_fast_kernels.reference.packed_attention import (
    packed_attention,
    packed_attention_backward,
)
from rlhf_fast_kernels.reference.paged_attention import paged_attention
from rlhf_fast_kernels.reference.ppo_loss import PPO_SUM_NAMES, ppo_loss
from rlhf_fast_kernels.reference.rewards_and_gae import gae, last_true, rewards_and_gae
from rlhf_fast_kernels.reference.rope_and_store import rope_and_store
from rlhf_fast_kernels.reference.sample import sample
from rlhf_fast_kernels.reference.whiten import (
    masked_moments,
    mean_and_scale,
    merge_moments,
    moments_dtype,
    row_moments,
    whiten,
)

__all__ = [
    "KL_ESTIMATORS",
    "PPO_SUM_NAMES",
    "gae",
    "kl_estimate",
    "kl_from_logits",
    "last_true",
    "linear_kl",
    "linear_logprobs",
    "linear_ppo_loss",
    "logprobs_from_logits",
    "masked_moments",
    "mean_and_scale",
    "merge_moments",
    "moments_dtype",
    "output_dtype",
    "packed_attention",
    "packed_attention_backward",
    "paged_attention",
    "ppo_loss",
    "rewards_and_gae",
    "rope_and_store",
    "row_moments",
    "sample",
    "whiten",
]
