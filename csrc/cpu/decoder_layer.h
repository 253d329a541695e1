// A decoder layer of Llama's form over packed tokens, and its gradients: the ops of this folder in order.
//
//     q, k, v = n W_q^T, n W_k^T, n W_v^T (+ biases),   n = rms_norm(x)
//     q, k    = rotary(rms_norm_heads(q)), rotary(rms_norm_heads(k))
//     y       = x + attention(q, k, v) W_o^T (+ bias)
//     out     = y + swiglu(m W_gate^T, m W_up^T) W_down^T,   m = rms_norm(y)
//
// One call, because between two calls from Python a thread waits for the interpreter's lock: two models
// trained side by side spent half of their time in that.
#pragma once

#include "cpu/isa.h"

namespace rlhf_fast {

// Fortran's sgemm, column-major.
using Sgemm = void (*)(const char* transpose_a, const char* transpose_b, const int64_t* m,
                       const int64_t* n, const int64_t* k, const float* alpha, const float* a,
                       const int64_t* lda, const float* b, const int64_t* ldb, const float* beta,
                       float* c, const int64_t* ldc);

// Addresses of one for each parameter: of weights, or of their gradients. Null: there is none.
template <class T>
struct LayerParameters {
  T* input_norm = nullptr;  // [hidden]
  T* q = nullptr;           // [heads head_dim, hidden]
  T* k = nullptr;           // [kv_heads head_dim, hidden]
  T* v = nullptr;
  T* o = nullptr;  // [hidden, heads head_dim]
  T* post_norm = nullptr;
  T* gate = nullptr;  // [inner, hidden]
  T* up = nullptr;
  T* down = nullptr;  // [hidden, inner]
  T* q_bias = nullptr;
  T* k_bias = nullptr;
  T* v_bias = nullptr;
  T* o_bias = nullptr;
  T* q_norm = nullptr;  // [head_dim]
  T* k_norm = nullptr;
};

// What forward leaves to backward. qkv [tokens, (heads + 2 kv_heads) head_dim]: with q and k rotated, or as they
// came from the product where they are normed; then q and k [tokens, heads, head_dim] are apart.
struct LayerKept {
  float* qkv = nullptr;
  float* q = nullptr;
  float* k = nullptr;
  float* attended = nullptr;  // [tokens, heads head_dim]
  float* lse = nullptr;       // [tokens, heads]
  float* y = nullptr;         // [tokens, hidden]
  float* gate = nullptr;      // [tokens, inner]
  float* up = nullptr;
};

struct DecoderLayerArgs {
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t inner = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t segments = 0;
  int64_t window = 0;
  float eps = 0.0f;
  float scale = 1.0f;
  const int32_t* cu_seqlens = nullptr;
  const float* x = nullptr;    // [tokens, hidden]
  const float* cos = nullptr;  // [tokens, head_dim]
  const float* sin = nullptr;
  LayerParameters<const float> weights;
  LayerKept kept;  // backward writes over gate and up
  // Forward: [tokens, hidden], and [tokens, inner], which may be kept.gate.
  float* out = nullptr;
  float* product = nullptr;
  // Backward: the gradient of out, that of x, those that are asked for (of norms always; of q, k and v one
  // matrix [(heads + 2 kv_heads) head_dim, hidden], at q), and room of decoder_layer_room floats.
  const float* above = nullptr;
  float* below = nullptr;
  LayerParameters<float> gradients;
  float* room = nullptr;

  Sgemm sgemm = nullptr;  // used where tiles_usable() is false
  void* scratch = nullptr;  // of matmul
  int threads = 1;
};

// What backward needs beside what it writes: a wide and a narrow row a token, twice, and one more
// where q and k are normed.
inline int64_t decoder_layer_room(const DecoderLayerArgs& args) {
  const int64_t q = args.heads * args.head_dim, kv = args.kv_heads * args.head_dim;
  const int64_t qkv = q + 2 * kv;
  const int64_t normed = args.weights.q_norm == nullptr ? 0 : 2 * (q > kv ? q : kv);
  const int64_t first = args.inner > qkv ? args.inner : qkv;
  const int64_t second = args.inner > q ? args.inner : q;
  return args.tokens * (2 * args.hidden + first + second + normed);
}

RLHF_FAST_CPU_OP(decoder_layer_forward, DecoderLayerArgs)
RLHF_FAST_CPU_OP(decoder_layer_backward, DecoderLayerArgs)

}  // namespace rlhf_fast
