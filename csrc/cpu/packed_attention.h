// Causal attention inside the segments of a packed batch, and its gradients.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// [tokens, heads, head_dim] with adjacent elements of a head; strides count elements.
struct HeadsView {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Token i of a segment sees tokens max(0, i - window + 1) .. i of it (window 0: from 0); query head h reads
// key-value head h / (query_heads / kv_heads).
//
//     lse[i]  = ln sum_j exp(scale q_i . k_j)            out[i] = sum_j exp(scale q_i . k_j - lse[i]) v_j
//
// The gradients form exp(scale q_i . k_j - lse[i]) again.
struct PackedAttentionArgs {
  static constexpr int64_t kWidest = 256;  // head_dim

  DType dtype = DType::f32;
  int64_t segments = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  const int32_t* cu_seqlens = nullptr;  // [segments + 1]
  float scale = 1.0f;
  int64_t window = 0;
  HeadsView q, k, v, out;
  float* lse = nullptr;  // [tokens, query_heads], contiguous
  // Of the gradients alone.
  HeadsView grad_out, grad_q, grad_k, grad_v;
  int threads = 1;
};

RLHF_FAST_CPU_OP(packed_attention, PackedAttentionArgs)
RLHF_FAST_CPU_OP(packed_attention_backward, PackedAttentionArgs)

}  // namespace rlhf_fast
