// Mean and variance over the valid tokens, and the normalisation that uses them.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

struct MaskedMomentsArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  View x;
  MaskView mask;          // null: every element counts
  double* out = nullptr;  // [3]: count, mean, sum of squared deviations from the mean
  int threads = 1;
};

// out = (x - mean)*scale + offset where valid, 0 elsewhere; contiguous [rows, columns].
struct WhitenArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  View x;
  MaskView mask;
  double mean = 0.0;
  double scale = 1.0;
  double offset = 0.0;
  float* out = nullptr;
  int threads = 1;
};

RLHF_FAST_CPU_OP(masked_moments, MaskedMomentsArgs)
RLHF_FAST_CPU_OP(whiten, WhitenArgs)

}  // namespace rlhf_fast
