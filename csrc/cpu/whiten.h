// Mean and variance over the valid tokens, and the normalisation that uses them.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Elements, in row-major order, whose moments are formed together before the rest is merged.
constexpr int64_t kMomentsChunk = 2048;

struct MaskedMomentsArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  View x;
  MaskView mask;               // null: every element counts
  double* partials = nullptr;  // CUDA only: [chunks, 3]
  double* out = nullptr;       // [3]: count, mean, sum of squared deviations from the mean; on CUDA
                               // null leaves it at the partials
  int threads = 1;
};

// out = (x - mean)*scale (+ mean if it is kept) where valid, 0 elsewhere; contiguous [rows, columns].
// Mean and scale come from moments that are merged first, and read where they lie.
struct WhitenArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  View x;
  MaskView mask;
  const double* stats = nullptr;  // [sets, 3] of disjoint sets
  int64_t sets = 1;
  double* merged = nullptr;       // CUDA only: [3], used if there are many sets
  bool shift_mean = true;
  bool unbiased = false;
  double eps = 0.0;
  float* out = nullptr;
  int threads = 1;
};

RLHF_FAST_CPU_OP(masked_moments, MaskedMomentsArgs)
RLHF_FAST_CPU_OP(whiten, WhitenArgs)

}  // namespace rlhf_fast
