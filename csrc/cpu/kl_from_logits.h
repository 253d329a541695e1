// KL(softmax(z) || softmax(q)) per row of two tensors of logits, and its gradient by the first, where
// z = x / temperature or softcap * tanh(x / softcap) / temperature, and q the same of the reference.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Entry (r, j) of a view lies at r * row_stride + j: `columns` entries of a row are contiguous.
struct KlRows {
  int64_t rows = 0;
  int64_t columns = 0;                 // entries that belong to the vocabulary: the others are not read
  View logits;
  View ref_logits;
  MaskView mask;                       // one byte a row; false: not read, KL 0. Null: every row counts
  const float* temperature = nullptr;  // per row; null: `scalar_temperature`
  double scalar_temperature = 1.0;
  double softcap = 0.0;                // 0: none
  double ref_softcap = 0.0;
  int threads = 1;
};

struct KlForwardArgs {
  KlRows rows;
  bool shard = false;                  // kl: sum_j p_j (z_j - q_j) with p normalised over these columns
  double* kl = nullptr;
  double* lse = nullptr;               // of z, nats
  double* ref_lse = nullptr;           // of q
};

struct KlBackwardArgs {
  KlRows rows;
  const float* kl = nullptr;           // of the whole vocabulary, like the next two
  const double* lse = nullptr;
  const double* ref_lse = nullptr;
  const float* grad_kl = nullptr;
  View out;                            // may be either side's logits; written, or added to
  int64_t width = 0;                   // entries of a row of `out`: 0 from `columns` on, unless added to
  bool accumulate = false;
};

RLHF_FAST_CPU_OP(kl_from_logits_forward, KlForwardArgs)
RLHF_FAST_CPU_OP(kl_from_logits_backward, KlBackwardArgs)

}  // namespace rlhf_fast
