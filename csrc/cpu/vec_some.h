// A vector of the elements of a row in their order, or of the few that end it: fp32 and bf16.
#pragma once

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

inline vfloat load_some(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  vfloat x = splat(0.0f);
  for (int64_t i = 0; i < count; ++i) x[i] = from[i];
  return x;
#endif
}

inline vfloat load_some(const uint16_t* from, int64_t count) {
  vfloat x = splat(0.0f);
  for (int64_t i = 0; i < count; ++i) x[i] = bf16_to_float(from[i]);
  return x;
}

inline vfloat load_all(const float* from) { return load(from); }

inline vfloat load_all(const uint16_t* from) {
  typedef uint16_t vhalf __attribute__((vector_size(kLanes * 2)));
  vhalf bits;
  std::memcpy(&bits, from, sizeof(bits));
  return from_bits(__builtin_convertvector(bits, vint) << 16);
}

inline void store_some(float* to, int64_t count, vfloat x) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
#endif
}

inline void store_some(uint16_t* to, int64_t count, vfloat x) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(x[i]);
}

// f(c, load, store) for each vector of a row of `count` elements: load(x) gives the vector of row x at c,
// store(x, value) writes it.
template <class Body>
inline void each_vector(int64_t count, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    body([c](const float* x) { return load(x + c); },
         [c](float* x, vfloat value) { store(x + c, value); });
  }
  if (c == count) return;
  const int64_t rest = count - c;
  body([c, rest](const float* x) { return load_some(x + c, rest); },
       [c, rest](float* x, vfloat value) { store_some(x + c, rest, value); });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
