// Each reads what it needs once and writes once, where the separate operations take several passes.
#include "cpu/layer_gradients.h"

#include <cmath>
#include <cstdlib>

#include "cpu/vec_some.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kPart = 4096;      // elements of a chunk
constexpr int64_t kAlone = 1 << 15;  // elements below which a second thread costs more than it saves

int threads_for(int64_t elements, int threads) { return elements < kAlone ? 1 : threads; }

// 1 / (1 + e^-x); 0 and 1 far out, NaN for NaN.
vfloat sigmoid(vfloat x) {
  const vfloat y = vmin(splat(85.0f), vmax(splat(-85.0f), x));
  return splat(1.0f) / (splat(1.0f) + exponential(splat(0.0f) - y).exp);
}

void swiglu_part(const SwigluArgs& args, int64_t begin, int64_t count) {
  const float *gate = args.gate + begin, *up = args.up + begin;
  if (args.grad_out == nullptr) {
    float* out = args.out + begin;
    each_vector(count, [&](const auto& at, const auto& put) {
      const vfloat g = at(gate);
      put(out, g * sigmoid(g) * at(up));
    });
    return;
  }
  const float* grad_out = args.grad_out + begin;
  float *grad_gate = args.grad_gate + begin, *grad_up = args.grad_up + begin;
  float* out = args.out == nullptr ? nullptr : args.out + begin;
  each_vector(count, [&](const auto& at, const auto& put) {
    const vfloat g = at(gate), u = at(up), above = at(grad_out), s = sigmoid(g), silu = g * s;
    put(grad_up, above * silu);
    put(grad_gate, above * u * (s * (splat(1.0f) + g * (splat(1.0f) - s))));
    if (out != nullptr) put(out, silu * u);
  });
}

void rotate_head(const RotaryArgs& args, const float* x, const float* cos, const float* sin,
                 float* out) {
  const int64_t half = args.half;
  each_vector(half, [&](const auto& at, const auto& put) {
    const vfloat a = at(x), b = at(x + half);
    if (args.transposed) {
      put(out, a * at(cos) + b * at(sin + half));
      put(out + half, b * at(cos + half) - a * at(sin));
    } else {
      put(out, a * at(cos) - b * at(sin));
      put(out + half, b * at(cos + half) + a * at(sin + half));
    }
  });
}

// grad_x of a row; adds its part to `grad_weight`.
void norm_row(const RmsNormBackwardArgs& args, int64_t row, float* grad_weight) {
  const int64_t columns = args.columns;
  const float *x = args.x + row * columns, *above = args.grad_y + row * columns;
  vfloat squares = splat(0.0f), products = splat(0.0f);
  each_vector(columns, [&](const auto& at, const auto&) {
    const vfloat v = at(x);
    squares = fma(v, v, squares);
    products = fma(at(above) * at(args.weight), v, products);
  });
  const double width = static_cast<double>(columns);
  const double r = 1.0 / ::sqrt(add_lanes(squares) / width + static_cast<double>(args.eps));
  // r mean(g x r) r: what a unit of x takes from grad_x.
  const vfloat pull = splat(static_cast<float>(r * r * r * (add_lanes(products) / width)));
  const vfloat inverse = splat(static_cast<float>(r));
  float* grad_x = args.grad_x + row * columns;
  const float* residual = args.residual == nullptr ? nullptr : args.residual + row * columns;
  each_vector(columns, [&](const auto& at, const auto& put) {
    const vfloat v = at(x), y = at(above);
    const vfloat own = inverse * (y * at(args.weight)) - pull * v;
    put(grad_x, residual == nullptr ? own : at(residual) + own);
    put(grad_weight, at(grad_weight) + y * (v * inverse));
  });
}

}  // namespace

void swiglu(const SwigluArgs& args) {
  parallel_for(args.count, kPart, threads_for(args.count, args.threads),
               [&args](int64_t begin, int64_t end) { swiglu_part(args, begin, end - begin); });
}

void rotary(const RotaryArgs& args) {
  const int64_t width = 2 * args.half, row = args.heads * width;
  if (row == 0) return;
  const int64_t grain = larger(1, kPart / row);
  parallel_for(args.tokens, grain, threads_for(args.tokens * row, args.threads),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   for (int64_t h = 0; h < args.heads; ++h) {
                     const float* x = args.x + t * args.token_stride + h * args.head_stride;
                     rotate_head(args, x, args.cos + t * width, args.sin + t * width,
                                 args.out + t * args.out_token_stride + h * args.out_head_stride);
                   }
                 }
               });
}

// Rows are summed in chunks of a fixed size, chunks in order: grad_weight is the same for any threads.
void rms_norm_backward(const RmsNormBackwardArgs& args) {
  constexpr int64_t kRows = 128;
  const int64_t columns = args.columns, chunks = (args.rows + kRows - 1) / kRows;
  auto* parts = static_cast<float*>(std::malloc((chunks * columns + 1) * sizeof(float)));
  parallel_for(args.rows, kRows, threads_for(args.rows * columns, args.threads),
               [&](int64_t begin, int64_t end) {
                 float* part = parts + begin / kRows * columns;
                 for (int64_t c = 0; c < columns; ++c) part[c] = 0.0f;
                 for (int64_t row = begin; row < end; ++row) norm_row(args, row, part);
               });
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0.0;
    for (int64_t i = 0; i < chunks; ++i) sum += static_cast<double>(parts[i * columns + c]);
    args.grad_weight[c] = static_cast<float>(sum);
  }
  std::free(parts);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
