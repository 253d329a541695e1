// Log-probability of the label, entropy and log-sum-exp of softmax(z) per row of logits x, where
// z = x / temperature or softcap * tanh(x / softcap) / temperature.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Row r = o*inner + i of the logits starts at o*outer_stride + i*inner_stride (in elements); its
// `columns` entries are contiguous. Everything per label is contiguous.
struct LogitRows {
  const void* logits = nullptr;
  DType dtype = DType::f32;
  int64_t outer = 0;
  int64_t inner = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  int64_t columns = 0;                   // entries that belong to the vocabulary: the others are not read
  int64_t vocab_start = 0;               // id of column 0
  int64_t vocab_size = 0;                // labels outside [0, vocab_size) except ignore_index: NaN
  const int64_t* labels = nullptr;
  int64_t ignore_index = -100;
  const float* temperature = nullptr;    // per label; null: `scalar_temperature`
  double scalar_temperature = 1.0;
  double softcap = 0.0;                  // 0: none
  int threads = 1;
};

struct LogprobsForwardArgs {
  LogitRows rows;
  int64_t count = 0;                     // of labels
  const int64_t* row_of = nullptr;       // row of each label; null: the label's own position
  bool shard = false;                    // logprobs: z of the label, 0 where other columns hold it
  float* logprobs = nullptr;
  float* entropy = nullptr;              // null: not wanted
  double* lse = nullptr;                 // of z, nats
};

struct LogprobsBackwardArgs {
  LogitRows rows;
  const int64_t* slot_of = nullptr;      // position of each row's label, -1: none, its gradient is 0;
                                         // null: the row's own position
  const float* entropy = nullptr;        // needed with grad_entropy only
  const double* lse = nullptr;
  const float* grad_logprobs = nullptr;  // null: zero
  const float* grad_entropy = nullptr;   // null: zero
  void* grad_logits = nullptr;           // may be the logits themselves if of the same dtype
  DType grad_dtype = DType::f32;
  int64_t grad_outer_stride = 0;
  int64_t grad_inner_stride = 0;
  int64_t width = 0;                     // entries of a row of the gradient: 0 from `columns` on
};

RLHF_FAST_CPU_OP(logprobs_from_logits_forward, LogprobsForwardArgs)
RLHF_FAST_CPU_OP(logprobs_from_logits_backward, LogprobsBackwardArgs)

}  // namespace rlhf_fast
