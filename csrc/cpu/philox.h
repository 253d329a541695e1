// Philox4x32-10 on vectors (Salmon et al., SC 2011): four random words for every lane's counter.
#pragma once

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

typedef uint64_t vlong __attribute__((vector_size(kLanes * 4)));

constexpr int kRounds = 10;

// The product of the low halves of the 64-bit lanes.
inline vlong multiply_low(vlong a, uint32_t b) {
#if defined(__AVX512F__)
  return (vlong)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vlong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
}

struct Philox {
  uint64_t key[kRounds][2];
  uint64_t step_low;
  uint64_t step_high;

  Philox(uint64_t seed, uint64_t step) : step_low(step & 0xFFFFFFFFu), step_high(step >> 32) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (auto& round : key) {
      round[0] = low;
      round[1] = high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }

  // Every second counter, in the low halves of the lanes; what is in the high halves never matters.
  inline void half(vlong c0, vlong* word) const {
    vlong c1 = vlong{} + step_low, c2 = vlong{} + step_high, c3{};
    for (const auto& round : key) {
      const vlong p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ round[0];
      c2 = (p0 >> 32) ^ c3 ^ round[1];
      c1 = p1;
      c3 = p0;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }

  inline void words(vint counters, vint* word) const {
    vlong pair, even[4], odd[4];
    std::memcpy(&pair, &counters, sizeof(pair));
    half(pair, even);
    half(pair >> 32, odd);
    for (int w = 0; w < 4; ++w) {
      pair = (even[w] & 0xFFFFFFFFu) | (odd[w] << 32);
      std::memcpy(&word[w], &pair, sizeof(pair));
    }
  }
};

inline vfloat from_unsigned(vint bits) {
  typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
  return __builtin_convertvector((vuint)bits, vfloat);
}

// Bit l is set if lane l of a comparison's result is true.
inline uint32_t lane_bits(vint mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

inline vint lane_numbers(int32_t first, int32_t step) {
  vint numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = first + step * lane;
  return numbers;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
