// A row an item, two passes over it in the first-level cache: squares (and the residual's sum), then
// the scaled row. Sums run in one order whatever the number of threads.
#include "cpu/rms_norm.h"

#include <math.h>

#include "cpu/vec_pair.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

// Below this a second thread costs more than it brings.
constexpr int64_t kSingleThreadElements = 16384;
constexpr int64_t kElementsPerChunk = 8192;

template <class T>
T* row_of(const RmsNormArgs& args, const RowsView& view, int64_t row) {
  return static_cast<T*>(view.data) + (row / args.inner) * view.outer_stride +
         (row % args.inner) * view.inner_stride;
}

template <class T>
VecPair add_pairs(VecPair x, VecPair y) {
  return {rounded<T>(x.a + y.a), rounded<T>(x.b + y.b)};
}

// residual += x in the dtype, and the sum of its squares.
template <class T>
float add_and_square(const T* x, T* residual, int64_t columns) {
  VecPair sum = {};
  int64_t i = 0;
  for (; i + kPair <= columns; i += kPair) {
    const VecPair y = add_pairs<T>(load_pair(residual + i), load_pair(x + i));
    store_pair(residual + i, y);
    sum = {fma(y.a, y.a, sum.a), fma(y.b, y.b, sum.b)};
  }
  if (i < columns) {
    const VecPair y =
        add_pairs<T>(load_tail(residual + i, columns - i), load_tail(x + i, columns - i));
    store_tail(residual + i, columns - i, y);
    sum = {fma(y.a, y.a, sum.a), fma(y.b, y.b, sum.b)};
  }
  return static_cast<float>(add_lanes(sum.a) + add_lanes(sum.b));
}

template <class T>
float square(const T* x, int64_t columns) {
  VecPair sum = {};
  int64_t i = 0;
  for (; i + kPair <= columns; i += kPair) {
    const VecPair y = load_pair(x + i);
    sum = {fma(y.a, y.a, sum.a), fma(y.b, y.b, sum.b)};
  }
  if (i < columns) {
    const VecPair y = load_tail(x + i, columns - i);
    sum = {fma(y.a, y.a, sum.a), fma(y.b, y.b, sum.b)};
  }
  return static_cast<float>(add_lanes(sum.a) + add_lanes(sum.b));
}

template <class T, bool kOffset>
vfloat scaled(vfloat x, vfloat weight, vfloat scale, vfloat offset) {
  if (kOffset) return x * scale * (offset + weight);
  return rounded<T>(x * scale) * weight;
}

template <class T, bool kOffset>
void normalise(const T* x, const T* weight, T* out, int64_t columns, float scale, float offset) {
  const vfloat s = splat(scale), o = splat(offset);
  int64_t i = 0;
  for (; i + kPair <= columns; i += kPair) {
    const VecPair y = load_pair(x + i), w = load_pair(weight + i);
    store_pair(out + i, {scaled<T, kOffset>(y.a, w.a, s, o), scaled<T, kOffset>(y.b, w.b, s, o)});
  }
  if (i == columns) return;
  const VecPair y = load_tail(x + i, columns - i), w = load_tail(weight + i, columns - i);
  store_tail(out + i, columns - i,
             {scaled<T, kOffset>(y.a, w.a, s, o), scaled<T, kOffset>(y.b, w.b, s, o)});
}

template <class T>
void norm_row(const RmsNormArgs& args, int64_t row) {
  const T* x = row_of<T>(args, args.x, row);
  const T* weight = static_cast<const T*>(args.weight);
  T* out = row_of<T>(args, args.out, row);
  float squares;
  if (args.residual.data == nullptr) {
    squares = square(x, args.columns);
  } else {
    T* residual = row_of<T>(args, args.residual, row);
    squares = add_and_square(x, residual, args.columns);
    x = residual;
  }
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(args.columns) + args.eps);
  if (args.offset == 0.0f) {
    normalise<T, false>(x, weight, out, args.columns, scale, 0.0f);
  } else {
    normalise<T, true>(x, weight, out, args.columns, scale, args.offset);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args) {
  const int threads = args.rows * args.columns <= kSingleThreadElements ? 1 : args.threads;
  const int64_t grain = larger(1, kElementsPerChunk / larger(1, args.columns));
  parallel_for(args.rows, grain, threads, [&args](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (args.dtype == DType::f32) {
        norm_row<float>(args, row);
      } else {
        norm_row<uint16_t>(args, row);
      }
    }
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
