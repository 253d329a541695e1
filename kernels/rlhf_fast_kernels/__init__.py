"""Fused ops for PPO: PyTorch reference, C++ for CPUs, CUDA C++ and Triton; needs only torch."""

from rlhf_fast_kernels.decoder_layer import decoder_layer
from rlhf_fast_kernels.kl_from_logits import kl_from_logits
from rlhf_fast_kernels.kv_pages import Extension, PageAllocator
from rlhf_fast_kernels.layer_arguments import LayerSettings, LayerWeights
from rlhf_fast_kernels.layer_ops import rotary, swiglu, trained_rms_norm
from rlhf_fast_kernels.linear_kl import linear_kl
from rlhf_fast_kernels.linear_logprobs import linear_logprobs
from rlhf_fast_kernels.linear_ppo_loss import LinearPPOLossOutput, linear_ppo_loss
from rlhf_fast_kernels.linear_small import linear_small
from rlhf_fast_kernels.logprobs_from_logits import logprobs_from_logits
from rlhf_fast_kernels.packed_attention import packed_attention
from rlhf_fast_kernels.paged_attention import PagedAttention, paged_attention
from rlhf_fast_kernels.ppo_loss import ppo_loss
from rlhf_fast_kernels.ppo_metrics import PPOLossOutput, finalize_metrics
from rlhf_fast_kernels.rewards_and_gae import RewardsAndGAE, gae, rewards_and_gae
from rlhf_fast_kernels.rms_norm import rms_norm
from rlhf_fast_kernels.rope_and_store import RopeAndStore, rope_and_store
from rlhf_fast_kernels.sample import sample
from rlhf_fast_kernels.sample_arguments import SampleOutput
from rlhf_fast_kernels.silu_mul import silu_mul
from rlhf_fast_kernels.whiten import masked_moments, merge_moments, whiten

__all__ = [
    "Extension",
    "LayerSettings",
    "LayerWeights",
    "LinearPPOLossOutput",
    "PPOLossOutput",
    "PageAllocator",
    "PagedAttention",
    "RewardsAndGAE",
    "RopeAndStore",
    "SampleOutput",
    "decoder_layer",
    "finalize_metrics",
    "gae",
    "kl_from_logits",
    "linear_kl",
    "linear_logprobs",
    "linear_ppo_loss",
    "linear_small",
    "logprobs_from_logits",
    "masked_moments",
    "merge_moments",
    "packed_attention",
    "paged_attention",
    "ppo_loss",
    "rewards_and_gae",
    "rms_norm",
    "rope_and_store",
    "rotary",
    "sample",
    "silu_mul",
    "swiglu",
    "trained_rms_norm",
    "whiten",
]
