// Per-token KL, reward placement and generalised advantage estimation in one pass over the tokens.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

enum class KlEstimator : int32_t { k1 = 1, k2 = 2, k3 = 3 };

// The arguments of the CPU and the CUDA implementation (there all pointers are device pointers).
//
// Padded: `rows` = S, `columns` = R; element (s, t) of a view lies at s*row_stride + t*column_stride.
// Packed: `rows` = K segments; cu_seqlens holds K + 1 token offsets; token t of segment s lies at
// (cu_seqlens[s] + t)*column_stride. Outputs are contiguous in the same order as the tokens.
// The KL is `kl` if that is given, else an estimate from the log-probs, else (no reference) 0.
struct RewardsAndGaeArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t tokens = 0;                    // elements of each output
  const void* cu_seqlens = nullptr;      // null: padded
  bool wide_offsets = true;              // they are int64, else int32

  View rewards;                          // given: these are the rewards, and the next six are unused
  View old_logprobs;
  View ref_logprobs;
  View kl;
  View scores;                           // [rows], or per token
  bool scores_per_token = false;
  KlEstimator kl_estimator = KlEstimator::k1;

  View values;
  MaskView mask;                         // null: every token counts
  View bootstrap;                        // [rows] in row_stride; null: 0

  bool kl_in_reward = true;
  float kl_coef = 0.0f;
  float log_ratio_clamp = 0.0f;          // of |old - ref|; infinity: none
  float reward_clip = 0.0f;              // of |score|; infinity: none
  float gamma = 1.0f;
  float gae_lambda = 1.0f;

  float* out_rewards = nullptr;          // null together with out_kl when `rewards` is given
  float* out_kl = nullptr;
  float* out_advantages = nullptr;
  float* out_returns = nullptr;
  double* out_moments = nullptr;         // [rows, 3] count, mean, m2 of the advantages, or null
  int threads = 1;                       // CPU only
};

RLHF_FAST_CPU_OP(rewards_and_gae, RewardsAndGaeArgs)

}  // namespace rlhf_fast
