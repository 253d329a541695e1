#pragma once

// Sums over a row of logits, for softmax, log-softmax and entropy.
//
// A row is a list of segments of kSegment entries; each gives (shift, sum, weighted) with
//
//     y = x * log2(e) / temperature,   sum = sum 2^(y - shift),   weighted = sum (y - shift) 2^(y - shift)
//
// in one read, and segments are merged in order, so a row's result depends on that row alone, not on
// the number of threads. `shift` is the maximum of the first few entries of the segment, not of
// all: a block is read once, optimistically, and again from the first-level cache in the rare case
// that its sum shows that something in it was far larger. That saves the separate pass for the
// maximum and tracking one. Within a block sums are fp32 per lane, across blocks fp64.

#include <cmath>
#include <cstdint>

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

inline constexpr int64_t kSegment = 16384;
inline constexpr int64_t kBlock = 4096;
inline constexpr int64_t kProbe = 256;
inline constexpr double kTooHigh = 4294967296.0;      // y - shift < 32: its rounding error is 1e-6 at most
inline constexpr double kPowerOfCentre = kCentre == 0.0f ? 1.0 : 1.0108892860517005;  // 2^(1/64)
inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr int kStep = kLanes == 16 ? 8 : 4;    // vectors in flight, as the registers allow
inline constexpr int64_t kPrefetchBytes = 4096;       // 10 % faster on Zen 5 in fp32 and bf16

// fp32 as it lies; a tail shorter than a vector is padded with -inf by the caller.
struct Float32 {
  using Element = float;
  static constexpr int64_t kPerVector = kLanes;
  static constexpr int kVectors = 1;
  static float get(const Element* x) { return *x; }
  static void set(Element* x, float value) { *x = value; }
  static Element lowest() { return -HUGE_VALF; }
  static void read(const Element* x, vfloat* out) { out[0] = load(x); }
  static vint pack(const vfloat* value) { return as_bits(value[0]); }
};

// Two vectors from one load. They hold even and odd entries, which a sum does not mind.
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kPerVector = 2 * kLanes;
  static constexpr int kVectors = 2;
  static float get(const Element* x) { return bf16_to_float(*x); }
  static void set(Element* x, float value) { *x = float_to_bf16(value); }
  static Element lowest() { return 0xFF80; }
  static void read(const Element* x, vfloat* out) { load_bf16_pair(x, out[0], out[1]); }
  static vint pack(const vfloat* value) { return pack_bf16_pair(value[0], value[1]); }
};

struct Stats {
  float shift = -HUGE_VALF;
  double sum = 0.0;
  double weighted = 0.0;
};

inline void rescale(Stats& stats, float shift) {
  if (stats.sum != 0.0) {  // also true for NaN; an empty sum must not become 0 * inf
    const double difference = static_cast<double>(stats.shift) - static_cast<double>(shift);
    const double factor = std::exp2(difference);
    stats.weighted = (stats.weighted + stats.sum * difference) * factor;
    stats.sum *= factor;
  }
  stats.shift = shift;
}

inline void merge(Stats& into, Stats next) {
  if (next.shift > into.shift) {
    rescale(into, next.shift);
  } else {
    rescale(next, into.shift);
  }
  into.sum += next.sum;
  into.weighted += next.weighted;
}

template <class Type>
float max_of(const typename Type::Element* x, int64_t count) {
  vfloat best = splat(-HUGE_VALF);
  vfloat value[Type::kVectors];
  int64_t i = 0;
  for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
    Type::read(x + i, value);
    for (const vfloat& v : value) best = vmax(v, best);
  }
  float result = max_lanes(best);
  for (; i < count; ++i) result = Type::get(x + i) > result ? Type::get(x + i) : result;
  return result;
}

template <class Type>
bool has_nan(const typename Type::Element* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (Type::get(x + i) != Type::get(x + i)) return true;
  }
  return false;
}

// Sums of one block relative to `shift`, in kStep independent chains to hide latency.
//
// kBounded keeps y above kLowestExponent: -inf then adds 2^-125, which no sum of ours can see,
// where otherwise y 2^y is NaN. The sums are those of exp2_centred, yet to be scaled.
template <bool kEntropy, bool kBounded>
struct Accumulator {
  vfloat sum[kStep];
  vfloat weighted[kStep];

  Accumulator() {
    for (int k = 0; k < kStep; ++k) sum[k] = weighted[k] = splat(0.0f);
  }

  inline void add(int k, vfloat x, vfloat scale, vfloat minus_shift) {
    vfloat y = fma(x, scale, minus_shift);
    if (kBounded) y = vmax(splat(kLowestExponent), y);
    const vfloat e = exp2_centred(y);
    sum[k] += e;
    if (kEntropy) weighted[k] = fma(y, e, weighted[k]);
  }

  static vfloat total(const vfloat* part) {
    vfloat all = part[0];
    for (int k = 1; k < kStep; ++k) all += part[k];
    return all;
  }
};

struct BlockSums {
  double sum;
  double weighted;
};

template <class Type, bool kEntropy, bool kBounded>
BlockSums block_sums(const typename Type::Element* x, int64_t count, float scale, float shift) {
  Accumulator<kEntropy, kBounded> acc;
  const vfloat factor = splat(scale);
  const vfloat minus_shift = splat(-shift);
  constexpr int64_t kPerStep = Type::kPerVector * (kStep / Type::kVectors);
  vfloat value[kStep];
  int64_t i = 0;
  for (; i + kPerStep <= count; i += kPerStep) {
    for (int k = 0; k < kStep; k += Type::kVectors) {
      const typename Type::Element* at = x + i + k / Type::kVectors * Type::kPerVector;
      Type::read(at, value + k);
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes);
    }
    for (int k = 0; k < kStep; ++k) acc.add(k, value[k], factor, minus_shift);
  }
  for (; i < count; i += Type::kPerVector) {
    if (count - i >= Type::kPerVector) {
      Type::read(x + i, value);
    } else {
      typename Type::Element padded[Type::kPerVector];
      for (int64_t j = 0; j < Type::kPerVector; ++j) {
        padded[j] = i + j < count ? x[i + j] : Type::lowest();
      }
      Type::read(padded, value);
    }
    for (int k = 0; k < Type::kVectors; ++k) acc.add(k, value[k], factor, minus_shift);
  }
  return {kPowerOfCentre * add_lanes(acc.total(acc.sum)),
          kEntropy ? kPowerOfCentre * add_lanes(acc.total(acc.weighted)) : 0.0};
}

// One read of the block in the common case. An entry far above the shift shows in the sum (infinite
// perhaps, never wrapped), one at -inf as NaN in `weighted`: then the block is read again.
template <class Type, bool kEntropy>
void add_block(const typename Type::Element* x, int64_t count, float scale, Stats& stats,
               bool& bounded) {
  BlockSums sums = bounded ? block_sums<Type, kEntropy, true>(x, count, scale, stats.shift)
                           : block_sums<Type, kEntropy, false>(x, count, scale, stats.shift);
  const bool in_range = sums.sum <= kTooHigh;  // false for NaN
  if (!in_range) {
    const float best = max_of<Type>(x, count) * scale - kCentre;
    if (best > stats.shift) rescale(stats, best);
  } else if (sums.weighted != sums.weighted) {
    bounded = true;  // where one entry is masked, others will be
  }
  if (!in_range || sums.weighted != sums.weighted) {
    sums = block_sums<Type, kEntropy, true>(x, count, scale, stats.shift);
  }
  stats.sum += sums.sum;
  stats.weighted += sums.weighted;
}

template <class Type, bool kEntropy>
Stats segment_stats(const typename Type::Element* x, int64_t count, float scale) {
  Stats stats;
  const float first = max_of<Type>(x, smaller(count, kProbe));
  if (first > -HUGE_VALF) stats.shift = first * scale - kCentre;
  bool bounded = kLowestCentred == kLowestExponent;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = smaller(kBlock, count - begin);
    if (stats.shift == -HUGE_VALF) {
      const float best = max_of<Type>(x + begin, length);
      if (best == -HUGE_VALF) {  // nothing but -inf, or NaN which max_of passes over
        if (has_nan<Type>(x + begin, length)) stats.sum += NAN;
        continue;
      }
      rescale(stats, best * scale - kCentre);
    }
    add_block<Type, kEntropy>(x + begin, length, scale, stats, bounded);
  }
  return stats;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
