// silu(gate) * up of rows that hold both.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// out[i] = gate[i] / (1 + e^-gate[i]) * up[i] with gate = row[0 .. columns), up = row[columns ..
// 2 columns); the first factor is rounded to the dtype, as Hugging Face's activation is.
struct SiluMulArgs {
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t columns = 0;  // of out
  const void* gate_up = nullptr;
  int64_t row_stride = 0;
  void* out = nullptr;
  int64_t out_row_stride = 0;
  int threads = 1;
};

RLHF_FAST_CPU_OP(silu_mul, SiluMulArgs)

}  // namespace rlhf_fast
