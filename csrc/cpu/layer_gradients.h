// The element-wise parts of a decoder layer for training, fp32: SwiGLU, rotation, and their gradients; the
// gradient of the root-mean-square norm.
#pragma once

#include "cpu/isa.h"

namespace rlhf_fast {

// out = silu(gate) * up; backward: from grad_out, grad_gate and grad_up, and out once more unless it is null.
// All of `count` elements. Gradients may be written over gate and up.
struct SwigluArgs {
  int64_t count = 0;
  const float* gate = nullptr;
  const float* up = nullptr;
  float* out = nullptr;
  const float* grad_out = nullptr;  // null: forward
  float* grad_gate = nullptr;
  float* grad_up = nullptr;
  int threads = 1;
};

// Rows x of [tokens, heads, 2 half], first and second half x1, x2 of a head:
//
//     y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2
//
// and with `transposed` the gradient, from y to x. cos, sin: [tokens, 2 half]. out may be x.
struct RotaryArgs {
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t half = 0;
  const float* x = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  const float* cos = nullptr;
  const float* sin = nullptr;
  float* out = nullptr;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;
  bool transposed = false;
  int threads = 1;
};

// y = x r weight with r = (mean x^2 + eps)^-1/2. From grad_y, with g = grad_y weight:
//
//     grad_x = r (g - x r mean(g x r))        grad_weight = sum over rows of grad_y x r
//
// and with a residual, x's gradient from elsewhere, grad_x = residual + that; they may be one.
struct RmsNormBackwardArgs {
  int64_t rows = 0;
  int64_t columns = 0;
  const float* x = nullptr;
  const float* weight = nullptr;
  const float* grad_y = nullptr;
  float eps = 0.0f;
  const float* residual = nullptr;
  float* grad_x = nullptr;
  float* grad_weight = nullptr;
  int threads = 1;
};

RLHF_FAST_CPU_OP(swiglu, SwigluArgs)
RLHF_FAST_CPU_OP(rotary, RotaryArgs)
RLHF_FAST_CPU_OP(rms_norm_backward, RmsNormBackwardArgs)

}  // namespace rlhf_fast
