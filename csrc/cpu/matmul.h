// Products of fp32 matrices on the tile unit (AMX) that newer x86 processors have.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Bytes of memory, on a line of the cache, that a product packs parts of b into.
constexpr int64_t kMatmulScratch = 128 * (1536 + 2) * 4;

// out = a b (+ add), a [rows, inner], b [inner, columns]. Strides are in elements; of a and of b one
// is 1. Adjacent elements of a row of out, and of add, which may be out; add_row 0: one row for all.
// Only where tiles_usable().
struct MatmulArgs {
  int64_t rows = 0;
  int64_t inner = 0;
  int64_t columns = 0;
  const float* a = nullptr;
  int64_t a_row = 0;
  int64_t a_inner = 0;
  const float* b = nullptr;
  int64_t b_inner = 0;
  int64_t b_column = 0;
  const float* add = nullptr;
  int64_t add_row = 0;
  float* out = nullptr;
  int64_t out_row = 0;
  void* scratch = nullptr;
  int threads = 1;
};

RLHF_FAST_CPU_OP(matmul, MatmulArgs)

}  // namespace rlhf_fast
