// Norm and rotation of queries and keys, and keys and values into their pages.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Strides count elements; the innermost dim of every tensor is contiguous. The
// integers are legal: Python has looked, or its caller vouches for them.
struct RopeAndStoreArgs {
  static constexpr int64_t kWidest = 256;  // head_dim

  DType dtype = DType::f32;
  int64_t tokens = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;  // the first so many entries of a head are rotated; 0: none
  int64_t page_size = 0;
  void* q = nullptr;  // in place
  int64_t q_strides[2] = {};  // of token, head
  const void* k = nullptr;
  int64_t k_strides[2] = {};
  const void* v = nullptr;
  int64_t v_strides[2] = {};
  void* keys = nullptr;
  int64_t key_strides[3] = {};  // of page, token, head
  void* values = nullptr;
  int64_t value_strides[3] = {};
  const int64_t* slots = nullptr;  // -1: not stored
  const int64_t* positions = nullptr;
  const float* cos = nullptr;
  int64_t cos_stride = 0;
  const float* sin = nullptr;
  int64_t sin_stride = 0;
  const void* q_norm = nullptr;  // null: off
  const void* k_norm = nullptr;
  float norm_eps = 0.0f;
  int threads = 1;
};

RLHF_FAST_CPU_OP(rope_and_store, RopeAndStoreArgs)

}  // namespace rlhf_fast
