// Parts of rows, element by element; nothing is summed, so the parts do not show in the result.
#include "cpu/silu_mul.h"

#include "cpu/vec_pair.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kSingleThreadElements = 16384;
constexpr int64_t kPart = 4096;

// Below this e^-x is taken as infinite: the result, -3e-36 or closer to 0, becomes -0 (NaN at -inf,
// as in PyTorch).
constexpr float kLowest = -85.0f;

vfloat silu(vfloat x) {
  const vfloat y = vmin(splat(85.0f), vmax(splat(kLowest), x));  // keeps NaN
  const vfloat e = exponential(splat(0.0f) - y).exp;
  const vint below = x < splat(kLowest);
  return x / (splat(1.0f) + select(below, splat(__builtin_inff()), e));
}

template <class T>
VecPair activated(VecPair gate, VecPair up) {
  return {rounded<T>(silu(gate.a)) * up.a, rounded<T>(silu(gate.b)) * up.b};
}

template <class T>
void part_of_row(const T* gate, const T* up, T* out, int64_t count) {
  int64_t i = 0;
  for (; i + kPair <= count; i += kPair) {
    store_pair(out + i, activated<T>(load_pair(gate + i), load_pair(up + i)));
  }
  if (i == count) return;
  store_tail(out + i, count - i,
             activated<T>(load_tail(gate + i, count - i), load_tail(up + i, count - i)));
}

template <class T>
void part(const SiluMulArgs& args, int64_t row, int64_t begin) {
  const T* gate = static_cast<const T*>(args.gate_up) + row * args.row_stride + begin;
  T* out = static_cast<T*>(args.out) + row * args.out_row_stride + begin;
  part_of_row(gate, gate + args.columns, out, smaller(kPart, args.columns - begin));
}

}  // namespace

void silu_mul(const SiluMulArgs& args) {
  const int threads = args.rows * args.columns <= kSingleThreadElements ? 1 : args.threads;
  const int64_t parts = (args.columns + kPart - 1) / kPart;
  if (parts == 0) return;
  const int64_t grain = larger(1, kPart / args.columns);
  parallel_for(args.rows * parts, grain, threads, [&args, parts](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      if (args.dtype == DType::f32) {
        part<float>(args, item / parts, item % parts * kPart);
      } else {
        part<uint16_t>(args, item / parts, item % parts * kPart);
      }
    }
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
