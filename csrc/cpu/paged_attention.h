// Attention of packed queries over keys and values in pages.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Strides count elements; the innermost dim of every tensor is contiguous. The
// integers are legal: Python has looked, or its caller vouches for them.
struct PagedAttentionArgs {
  static constexpr int64_t kWidest = 256;  // head_dim

  DType dtype = DType::f32;
  int64_t sequences = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t page_size = 0;
  const void* q = nullptr;
  int64_t q_strides[2] = {};  // of token, head
  void* out = nullptr;
  int64_t out_strides[2] = {};
  const void* keys = nullptr;
  int64_t key_strides[3] = {};  // of page, token, head
  const void* values = nullptr;
  int64_t value_strides[3] = {};
  const int32_t* page_table = nullptr;
  int64_t table_stride = 0;
  const int32_t* context_lengths = nullptr;
  const int32_t* cu_queries = nullptr;  // null: one query a sequence
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  int64_t window = 0;    // 0: off
  int threads = 1;
};

RLHF_FAST_CPU_OP(paged_attention, PagedAttentionArgs)

}  // namespace rlhf_fast
