// Root-mean-square norm of rows, with the residual added before it in the same pass.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Rows of [outer, inner, columns]; elements of a row are adjacent.
struct RowsView {
  void* data = nullptr;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
};

// out = x / rms(x) * weight, x being replaced by residual += x first if there is a residual. Rounded
// as Hugging Face does: with offset 0 to the dtype before the product with the weight (Llama),
// otherwise once, after the product with offset + weight (Gemma). out may be x.
struct RmsNormArgs {
  DType dtype = DType::f32;  // of all four
  int64_t rows = 0;          // outer * inner
  int64_t inner = 1;
  int64_t columns = 0;
  RowsView x;
  const void* weight = nullptr;  // [columns]
  RowsView residual;             // null: none
  RowsView out;
  float eps = 0.0f;
  float offset = 0.0f;
  int threads = 1;
};

RLHF_FAST_CPU_OP(rms_norm, RmsNormArgs)

}  // namespace rlhf_fast
