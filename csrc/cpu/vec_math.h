// Exponentials, min/max and bf16 for the vectors of vec.h; intrinsics where GCC's generic vectors
// compile to more than the one instruction the processor has.
//
// NaN: vmax(a, b) and vmin(a, b) return b if either is NaN (the x86 rule, kept everywhere), so the
// callers decide by argument order whether a NaN survives.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/vec.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

inline vint as_bits(vfloat x) {
  vint bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline vfloat from_bits(vint bits) {
  vfloat x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline vfloat select(vint mask, vfloat yes, vfloat no) {
  return from_bits((mask & as_bits(yes)) | (~mask & as_bits(no)));
}

#if defined(__AVX512F__)
// The zero-masking forms with every lane on: the same instructions, but the plain forms of GCC 12's
// header pass an undefined register and warn about it at every use.
constexpr __mmask16 kAll = 0xFFFF;
inline vfloat vmax(vfloat a, vfloat b) {
  return (vfloat)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
}
inline vfloat vmin(vfloat a, vfloat b) {
  return (vfloat)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b);
}
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
inline vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
inline vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
inline vfloat vmax(vfloat a, vfloat b) { return select(a > b, a, b); }
inline vfloat vmin(vfloat a, vfloat b) { return select(a < b, a, b); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif

// splat() adds to zero: an addition where the value is not a constant.
inline vfloat broadcast(const float* address) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_set1_ps(*address);
#elif defined(__AVX2__)
  return (vfloat)_mm256_set1_ps(*address);
#else
  return splat(*address);
#endif
}

// x = 2^n * (1 + something): n = round(x) as float, and 2^n applied to p in [0.7, 1.42].
struct Rounded {
  vfloat n;
#if !defined(__AVX512F__)
  vint shifted;  // low bits: n in two's complement
#endif
};

inline Rounded round_to_int(vfloat x) {
#if defined(__AVX512F__)
  return {(vfloat)_mm512_maskz_roundscale_ps(kAll, (__m512)x, _MM_FROUND_TO_NEAREST_INT)};
#else
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the significand.
  const vfloat magic = splat(12582912.0f);
  const vfloat moved = x + magic;
  return {moved - magic, as_bits(moved)};
#endif
}

inline vfloat scale_by_power(vfloat p, const Rounded& rounded) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)rounded.n);
#else
  return from_bits(as_bits(p) + (rounded.shifted << 23));
#endif
}

// Below this exponent 2^x is not a normal number on the integer path of scale_by_power.
constexpr float kLowestExponent = -125.0f;

// 2^x for x in [kLowestExponent, 126], relative error below 1.7e-7 (minimax of degree 5: 9.1e-8, the
// rest rounding), exactly 1 at 0; NaN gives NaN.
inline vfloat exp2_normal(vfloat x) {
  const Rounded rounded = round_to_int(x);
  const vfloat f = x - rounded.n;
  vfloat p = fma(splat(0.0013264727f), f, splat(0.009671513f));
  p = fma(p, f, splat(0.055507336f));
  p = fma(p, f, splat(0.24022242f));
  p = fma(p, f, splat(0.693147f));
  p = fma(p, f, splat(1.0f));
  return scale_by_power(p, rounded);
}

// 2^(x - kCentre): exactly 1 at kCentre, relative error below 1.7e-7, at least 2^125 for any x
// above 126; NaN gives NaN. x must not be below kLowestCentred.
//
// With AVX-512, 2^x = 2^floor(x) * 2^(j / 32) * 2^g for g in [0, 1/32): j indexes a table held in
// two registers, degree 2 is then enough for g, and -inf gives exactly 0 without a bound: 20 % fewer
// cycles in logprobs_from_logits on Zen 5. The centre lies in the middle of j = 0, where the
// polynomial has no error, and the table is lower by 2^kCentre.
#if defined(__AVX512F__)
constexpr float kCentre = 0.015625f;
constexpr float kLowestCentred = -__builtin_inff();
constexpr vfloat kPowersLow = {
    0.98922807f, 1.0108893f, 1.0330249f, 1.0556452f, 1.0787609f, 1.1023827f, 1.1265217f,
    1.1511893f, 1.1763971f, 1.2021568f, 1.2284806f, 1.2553809f, 1.28287f, 1.3109612f,
    1.3396676f, 1.3690025f};
constexpr vfloat kPowersHigh = {
    1.3989798f, 1.4296135f, 1.4609178f, 1.4929078f, 1.5255983f, 1.5590044f, 1.5931423f,
    1.6280276f, 1.6636766f, 1.7001065f, 1.7373339f, 1.7753766f, 1.8142523f, 1.8539792f,
    1.8945761f, 1.9360619f};

inline vfloat exp2_centred(vfloat x) {
  constexpr int kBelow32nds = 5 << 4 | _MM_FROUND_TO_NEG_INF;
  const vfloat g = (vfloat)_mm512_maskz_reduce_ps(kAll, (__m512)x, kBelow32nds);
  // 1.5 * 2^18 leaves floor(32 x) in the low bits, of which the lookup takes five.
  const __m512 index = _mm512_maskz_add_round_ps(kAll, (__m512)x, (__m512)splat(393216.0f),
                                                 _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vfloat power = (vfloat)_mm512_permutex2var_ps((__m512)kPowersLow, (__m512i)index,
                                                      (__m512)kPowersHigh);
  const vfloat slope = fma(splat(0.2428406f), g, splat(0.69311655f));
  const vfloat p = fma(power * g, slope, power);
  return (vfloat)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)x);  // times 2^floor(x)
}
#else
constexpr float kCentre = 0.0f;
constexpr float kLowestCentred = kLowestExponent;

inline vfloat exp2_centred(vfloat x) { return exp2_normal(vmin(splat(126.0f), x)); }
#endif

// e^x and, without cancellation near 0, e^x - 1 - x. For |x| <= 85; exact at 0; NaN gives NaN.
struct Exponential {
  vfloat exp;
  vfloat exp_minus_1;
  vfloat exp_minus_1_minus_x;
};

inline Exponential exponential(vfloat x) {
  const Rounded rounded = round_to_int(x * splat(1.44269504f));
  // ln 2 in two parts: the first has few enough bits for n * ln2 to be exact.
  vfloat r = fma(rounded.n, splat(-0.693359375f), x);
  r = fma(rounded.n, splat(2.12194440e-4f), r);
  vfloat p = fma(splat(0.0013814467f), r, splat(0.008368781f));
  p = fma(p, r, splat(0.041668393f));
  p = fma(p, r, splat(0.1666652f));
  p = fma(p, r, splat(0.49999994f));
  const vfloat beyond = p * r * r;
  Exponential result;
  result.exp = scale_by_power(beyond + r + splat(1.0f), rounded);
  const vint small = rounded.n == splat(0.0f);
  result.exp_minus_1 = select(small, beyond + r, result.exp - splat(1.0f));
  result.exp_minus_1_minus_x = select(small, beyond, result.exp - splat(1.0f) - x);
  return result;
}

// 2 * kLanes bf16 at `address` as two vectors: the elements of even and of odd index.
inline void load_bf16_pair(const uint16_t* address, vfloat& even, vfloat& odd) {
  vint bits;
  std::memcpy(&bits, address, sizeof(bits));
  even = from_bits(bits << 16);
  odd = from_bits(bits & (vint{} + static_cast<int32_t>(0xFFFF0000u)));
}

// Round to nearest even; NaN stays NaN (it comes from arithmetic, so its payload cannot overflow).
inline vint round_bits_to_bf16(vfloat x) {
  const vint bits = as_bits(x);
  return bits + 0x7FFF + ((bits >> 16) & 1);
}

inline vint pack_bf16_pair(vfloat even, vfloat odd) {
  const vint low = (round_bits_to_bf16(even) >> 16) & 0xFFFF;
  return low | (round_bits_to_bf16(odd) & (vint{} + static_cast<int32_t>(0xFFFF0000u)));
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// The sum of the lanes in fp64.
inline double add_lanes(vfloat x) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_maskz_cvtps_pd(0xFF, _mm512_castps512_ps256((__m512)x));
  const __m512d high =
      _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1));
  return _mm512_reduce_add_pd(low + high);
#else
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(x[lane]);
  return sum;
#endif
}

// NaN lanes are passed over.
inline float max_lanes(vfloat x) {
  float best = x[0];
  for (int lane = 1; lane < kLanes; ++lane) best = x[lane] > best ? x[lane] : best;
  return best;
}

// A store around the caches where the processor has one; `address` is aligned to a vector.
inline void stream_bits(void* address, vint bits) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(address), (__m512i)bits);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(address), (__m256i)bits);
#else
  std::memcpy(address, &bits, sizeof(bits));
#endif
}

// Streaming stores are weakly ordered: call this before another thread may look.
inline void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
