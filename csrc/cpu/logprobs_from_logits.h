// Log-probability of the label, entropy and log-sum-exp of softmax(logits / temperature) per row.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Row r = o*inner + i of the logits starts at o*outer_stride + i*inner_stride (in elements); its
// `vocab` entries are contiguous. Everything per row is contiguous in r.
struct LogitRows {
  const void* logits = nullptr;
  DType dtype = DType::f32;
  int64_t outer = 0;
  int64_t inner = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  int64_t vocab = 0;
  const int64_t* labels = nullptr;       // anything outside [0, vocab) except ignore_index: NaN
  int64_t ignore_index = -100;
  const float* temperature = nullptr;    // per row; null: `scalar_temperature`
  double scalar_temperature = 1.0;
  int threads = 1;
};

struct LogprobsForwardArgs {
  LogitRows rows;
  float* logprobs = nullptr;
  float* entropy = nullptr;              // null: not wanted
  double* lse = nullptr;                 // of logits / temperature, nats
};

struct LogprobsBackwardArgs {
  LogitRows rows;
  const float* entropy = nullptr;        // needed with grad_entropy only
  const double* lse = nullptr;
  const float* grad_logprobs = nullptr;  // null: zero
  const float* grad_entropy = nullptr;   // null: zero
  void* grad_logits = nullptr;           // same dtype; may be the logits themselves
  int64_t grad_outer_stride = 0;
  int64_t grad_inner_stride = 0;
};

RLHF_FAST_CPU_OP(logprobs_from_logits_forward, LogprobsForwardArgs)
RLHF_FAST_CPU_OP(logprobs_from_logits_backward, LogprobsBackwardArgs)

}  // namespace rlhf_fast
