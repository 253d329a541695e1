// softcap * tanh(x / softcap), the bound that Gemma puts on its logits, for vectors.
#pragma once

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

// tanh u, absolute error below 1.5e-7, relative below that for |u| < 0.5, where most logits lie: there an
// odd polynomial (minimax, 2e-8), else 1 - 2 / (1 + e^2u). +-inf gives +-1, NaN gives NaN.
inline vfloat tanh_of(vfloat u) {
  const vfloat square = u * u;
  vfloat p = fma(splat(0.0171511285f), square, splat(-0.0529941581f));
  p = fma(p, square, splat(0.133249059f));
  p = fma(p, square, splat(-0.33333075f));
  p = fma(p * square, u, u);
  const vfloat bounded = vmax(splat(-40.0f), vmin(splat(40.0f), u * splat(2.88539008f)));
  const vfloat far = splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp2_normal(bounded));
  return select(square < splat(0.25f), p, far);
}

struct Softcap {
  vfloat cap;
  vfloat inverse;

  explicit Softcap(double value)
      : cap(splat(static_cast<float>(value))), inverse(splat(static_cast<float>(1.0 / value))) {}

  vfloat tanh_at(vfloat x) const { return tanh_of(x * inverse); }
};

// The capped entries as fp32, those of a vector in any order: sums do not mind it.
template <class Type>
void cap_entries(const typename Type::Element* x, int64_t count, const Softcap& softcap, float* out) {
  vfloat value[Type::kVectors];
  int64_t i = 0;
  for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
    Type::read(x + i, value);
    for (int k = 0; k < Type::kVectors; ++k) {
      store(out + i + k * kLanes, softcap.cap * softcap.tanh_at(value[k]));
    }
  }
  for (; i < count; ++i) {
    out[i] = (softcap.cap * softcap.tanh_at(splat(Type::get(x + i))))[0];
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
