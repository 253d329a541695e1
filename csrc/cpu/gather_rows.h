// Rows of a table, as an embedding picks them.
#pragma once

#include "cpu/isa.h"

namespace rlhf_fast {

// out[n] = table[ids[n]]; rows are bytes, one after the other.
struct GatherRowsArgs {
  int64_t rows = 0;
  int64_t row_bytes = 0;
  const void* table = nullptr;
  int64_t table_stride = 0;  // bytes
  const int64_t* ids = nullptr;
  void* out = nullptr;
  int64_t out_stride = 0;  // bytes
};

RLHF_FAST_CPU_OP(gather_rows, GatherRowsArgs)

}  // namespace rlhf_fast
