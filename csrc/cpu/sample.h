// One token a row from softmax(logits / temperature) after top-k, top-p and min-p.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Everything per row is contiguous; the settings are legal (Python has looked).
struct SampleArgs {
  const void* logits = nullptr;          // row r starts at r * row_stride; its entries are contiguous
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t row_stride = 0;
  int64_t vocab = 0;
  const int64_t* seeds = nullptr;
  const int64_t* steps = nullptr;
  const float* temperature = nullptr;    // 0: greedy
  const int64_t* top_k = nullptr;        // 0: off
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  int threads = 1;
  int64_t* tokens = nullptr;             // -1 for an unusable row
  float* logprobs = nullptr;
  float* raw_logprobs = nullptr;
  float* entropy = nullptr;              // null: not wanted
};

RLHF_FAST_CPU_OP(sample, SampleArgs)

}  // namespace rlhf_fast
