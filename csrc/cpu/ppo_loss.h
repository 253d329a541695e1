// The PPO objective of a microbatch with its metrics and gradients, in one pass over the tokens.
#pragma once

#include "cpu/isa.h"
#include "cpu/rewards_and_gae.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Order of `sums`; part of the Python interface (PPO_SUM_NAMES in reference/ppo_loss.py).
enum PpoSum : int {
  kTokens,
  kPolicyLoss,
  kApproxKlK1,
  kApproxKlK2,
  kApproxKlK3,
  kRatio,
  kRatioSquared,
  kClipLow,
  kClipHigh,
  kClipDual,
  kKl,
  kEntropy,
  kValueTokens,
  kValueLoss,
  kValueClip,
  kReturns,
  kReturnsSquared,
  kResidual,
  kResidualSquared,
  kPpoSums,
};

// A contiguous tensor of `tokens` elements; data == nullptr: absent.
struct TokenTensor {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct PpoLossArgs {
  int64_t tokens = 0;
  const uint8_t* mask = nullptr;

  TokenTensor logprobs;       // the policy part: these three, or none
  TokenTensor old_logprobs;
  TokenTensor advantages;
  TokenTensor entropy;
  TokenTensor ref_logprobs;
  TokenTensor weights;
  TokenTensor values;         // the value part: values and returns, or none
  TokenTensor old_values;     // absent: no value clipping
  TokenTensor returns;
  TokenTensor kl;             // exact KL, in place of the estimate from ref_logprobs

  double normalizer = 1.0;
  double clip_eps_low = 0.0;
  double clip_eps_high = 0.0;
  double dual_clip = 0.0;     // infinity: none
  double entropy_coef = 0.0;
  double kl_coef = 0.0;
  double value_clip_eps = 0.0;
  double value_coef = 0.0;
  double log_ratio_clamp = 0.0;
  KlEstimator kl_estimator = KlEstimator::k3;
  bool own_kl_gradient = false;

  float* loss = nullptr;
  float* sums = nullptr;      // [kPpoSums]
  float* extrema = nullptr;   // [2]: max ratio, max of -ratio
  float* d_logprobs = nullptr;  // gradients of the loss; null: not wanted
  float* d_entropy = nullptr;
  float* d_values = nullptr;
  float* d_kl = nullptr;
  int threads = 1;
};

RLHF_FAST_CPU_OP(ppo_loss, PpoLossArgs)

}  // namespace rlhf_fast
