// Exact KL between the softmaxes of two sets of logits, and its gradient by the first; the maths is in
// kernels/rlhf_fast_kernels/kl_from_logits.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Row r = o*inner + i of the logits starts at o*outer_stride + i*inner_stride (in elements); its
// entries are contiguous.
struct KlSide {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t outer = 0;
  int64_t inner = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  double softcap = 0.0;                  // 0: none
};

// Both sides have the same outer and inner sizes. Everything per row is contiguous in r.
struct KlRows {
  KlSide actor;
  KlSide reference;
  int64_t columns = 0;                   // entries that belong to the vocabulary
  const float* temperature = nullptr;    // per row; null: `scalar_temperature`
  double scalar_temperature = 1.0;
  int threads = 1;
};

struct KlForwardArgs {
  KlRows rows;
  const uint8_t* mask = nullptr;         // per row; null: all. Others are not read and give 0
  bool shard = false;                    // a row without probability has KL 0, not NaN
  float* kl = nullptr;
  double* lse = nullptr;                 // of z, nats
  double* ref_lse = nullptr;
};

struct KlBackwardArgs {
  KlRows rows;
  const float* kl = nullptr;
  const double* lse = nullptr;
  const double* ref_lse = nullptr;
  const float* grad_kl = nullptr;        // rows with 0 are not read
  KlSide grad;                           // may be either side's logits themselves
  int64_t width = 0;                     // of the gradient; 0 from `columns` on
  bool accumulate = false;
};

RLHF_FAST_CPU_OP(kl_from_logits_forward, KlForwardArgs)
RLHF_FAST_CPU_OP(kl_from_logits_backward, KlBackwardArgs)

}  // namespace rlhf_fast
