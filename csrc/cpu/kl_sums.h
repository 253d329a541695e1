#pragma once

// Sums over two rows of logits, for the KL between their softmaxes.
//
// With x the actor's entry, x' the reference's (after softcaps) and T the temperature:
//
//     e  = exp(x / T - s)            s: shift, about the maximum
//     v  = c - (x - x') / T          c: centre, about lse - lse'; v is then log q - log p
//     e' = e exp(v) = exp(x' / T - (s - c))
//
//     sum = sum e     ref_sum = sum e'     tilt = sum e v     excess = sum e (exp v - 1 - v)
//
//     KL = excess / sum + log1p(r) - r,    r = (excess + tilt) / sum = ref_sum / sum - 1
//
// exactly, whatever c is. No term of `excess` is negative and each is computed without cancellation
// (vec_math.h shows how for exp), so its relative error in fp32 is some 1e-6 however small it is. Only
// log1p(r) - r, about -r^2 / 2, could cancel it, where c is off by much more than the spread of v under
// p: c is measured on the first few entries, and a block that finds it off is summed again.
//
// Sums are fp32 per lane within a block, fp64 across blocks; blocks and segments are merged in order.

#include <cmath>
#include <cstdint>

#include "cpu/logit_sums.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kNearest = 40.0f;    // |v| up to this needs no separate exp for the reference
constexpr float kPadding = -1e30f;   // finite: -inf on both sides would be a NaN difference
constexpr double kOffCentre = 64.0;  // c is off by more than 11 times the spread of v
constexpr double kHighest = 300.0;   // exp of it is far from the end of fp64
constexpr double kRounding = 1e-13;  // what rounding of v by 1e-7 makes of a KL of 0

struct KlStats {
  double shift = 0.0;   // s in units of ln 2
  double centre = 0.0;  // c in nats
  double sum = 0.0;
  double ref_sum = 0.0;
  double tilt = 0.0;
  double excess = 0.0;
  bool infinite = false;  // an entry that only the reference excludes

  double ref_shift() const { return shift * kLn2 - centre; }
  bool empty() const { return sum == 0.0 && ref_sum == 0.0; }  // false for NaN

  // lse - lse', to a fraction of the spread of v: that is what the gradient of a small KL needs, and
  // more than two sums in fp32 would give.
  double lse_difference() const {
    const double r = (excess + tilt) / sum;
    return centre - (std::fabs(r) < 0.5 ? std::log1p(r) : std::log(ref_sum / sum));
  }

  double divergence() const {
    if (infinite && sum == sum && ref_sum == ref_sum) return HUGE_VAL;
    const double r = (excess + tilt) / sum;
    const double kl = std::fabs(r) < 0.5 ? excess / sum + (std::log1p(r) - r)
                                         : std::log(ref_sum / sum) - tilt / sum;
    return kl < 0.0 ? 0.0 : kl;
  }
};

// The same sums about another shift, which may only rise, and centre.
inline void rebase(KlStats& stats, double shift, double ref_shift) {
  if (!stats.empty()) {
    const double step = (shift * kLn2 - ref_shift) - stats.centre;
    const double factor = std::exp2(stats.shift - shift);
    const double ref_sum = stats.ref_sum * std::exp(stats.ref_shift() - ref_shift);
    if (std::fabs(step) < 1.0) {
      const double growth = std::expm1(step);
      stats.excess = factor * (stats.excess * (1.0 + growth) + growth * stats.tilt +
                               (growth - step) * stats.sum);
      stats.tilt = factor * (stats.tilt + step * stats.sum);
    } else {
      stats.tilt = factor * (stats.tilt + step * stats.sum);
      stats.excess = ref_sum - factor * stats.sum - stats.tilt;
    }
    stats.sum *= factor;
    stats.ref_sum = ref_sum;
  }
  stats.shift = shift;
  stats.centre = shift * kLn2 - ref_shift;
}

// That of the centre of those sums that hold more of p: a small `excess` of theirs is then kept as it is.
inline double common_ref_shift(const KlStats& a, const KlStats& b, double shift) {
  const bool first = a.sum * std::exp2(a.shift - shift) >= b.sum * std::exp2(b.shift - shift);
  const double wanted = shift * kLn2 - (first ? a.centre : b.centre);
  const double highest = a.ref_shift() > b.ref_shift() ? a.ref_shift() : b.ref_shift();
  return highest - wanted < kHighest ? wanted : highest;
}

inline void merge(KlStats& into, KlStats next) {
  const bool infinite = into.infinite || next.infinite;
  if (into.empty()) {
    into = next;
  } else if (!next.empty()) {
    if (into.shift != next.shift || into.centre != next.centre) {
      const double shift = into.shift > next.shift ? into.shift : next.shift;
      const double ref_shift = common_ref_shift(into, next, shift);
      rebase(into, shift, ref_shift);
      rebase(next, shift, ref_shift);
    }
    into.sum += next.sum;
    into.ref_sum += next.ref_sum;
    into.tilt += next.tilt;
    into.excess += next.excess;
  }
  into.infinite = infinite;
}

struct KlScale {
  float log2;     // log2(e) / temperature
  float inverse;  // 1 / temperature

  explicit KlScale(double temperature)
      : log2(static_cast<float>(kLog2E / temperature)), inverse(static_cast<float>(1.0 / temperature)) {}
};

// exp(v) and, without cancellation near 0, exp(v) - 1 - v; v <= 88, and below -80 exp(v) is 0 for us.
inline void exponential_beyond(vfloat v, vfloat& exp, vfloat& beyond) {
  const vfloat bounded = vmax(splat(-80.0f), v);
  const Rounded rounded = round_to_int(bounded * splat(1.44269504f));
  vfloat r = fma(rounded.n, splat(-0.693359375f), bounded);  // as in `exponential`
  r = fma(rounded.n, splat(2.12194440e-4f), r);
  vfloat p = fma(splat(0.0013814467f), r, splat(0.008368781f));
  p = fma(p, r, splat(0.041668393f));
  p = fma(p, r, splat(0.1666652f));
  p = fma(p, r, splat(0.49999994f));
  const vfloat b = p * r * r;
  const vfloat power = scale_by_power(splat(1.0f), rounded);
  exp = fma(power, r + b, power);
  // With n = 0 the last two terms are exactly 0.
  beyond = fma(power, b, fma(power, r, -v) + (power - splat(1.0f)));
}

template <class Type>
struct KlBlock {
  using Element = typename Type::Element;
  const Element* x;
  const Element* ref;
  int64_t count;
  KlScale scale;
};

struct KlSums {
  static constexpr int kChains = 2;
  vfloat sum[kChains], ref_sum[kChains], tilt[kChains], excess[kChains], highest[kChains];
  vint impossible = vint{};

  KlSums() {
    for (int k = 0; k < kChains; ++k) {
      sum[k] = ref_sum[k] = tilt[k] = excess[k] = splat(0.0f);
      highest[k] = splat(-HUGE_VALF);
    }
  }

  KlStats total(float shift, float centre, double unit) const {
    KlStats stats;
    stats.shift = shift;
    stats.centre = centre;
    stats.sum = unit * add_lanes(sum[0] + sum[1]);
    stats.ref_sum = unit * add_lanes(ref_sum[0] + ref_sum[1]);
    stats.tilt = unit * add_lanes(tilt[0] + tilt[1]);
    stats.excess = unit * add_lanes(excess[0] + excess[1]);
    for (int lane = 0; lane < kLanes; ++lane) stats.infinite |= impossible[lane] != 0;
    return stats;
  }
};

// For entries that are neither -inf nor far apart; the sums tell if one was.
struct CommonEntries {
  vfloat scale, inverse, minus_shift, centre;

  CommonEntries(const KlScale& s, float shift, float c)
      : scale(splat(s.log2)), inverse(splat(s.inverse)), minus_shift(splat(-shift)), centre(splat(c)) {}

  static constexpr double unit() { return kPowerOfCentre; }

  inline void add(KlSums& sums, int k, vfloat x, vfloat ref) const {
    vfloat y = fma(x, scale, minus_shift);
    if (kLowestCentred == kLowestExponent) y = vmax(splat(kLowestExponent), y);
    const vfloat e = exp2_centred(y);
    const vfloat v = fma(ref - x, inverse, centre);
    vfloat exp, beyond;
    exponential_beyond(v, exp, beyond);
    sums.sum[k] += e;
    sums.ref_sum[k] = fma(e, exp, sums.ref_sum[k]);
    sums.tilt[k] = fma(e, v, sums.tilt[k]);
    sums.excess[k] = fma(e, beyond, sums.excess[k]);
    sums.highest[k] = vmax(v, sums.highest[k]);
  }
};

// For any entries; the shifts must be the maxima of the block.
struct AnyEntries {
  vfloat scale, inverse, minus_shift, minus_ref_shift, centre;

  AnyEntries(const KlScale& s, float shift, float c)
      : scale(splat(s.log2)),
        inverse(splat(s.inverse)),
        minus_shift(splat(-shift)),
        minus_ref_shift(splat(static_cast<float>(static_cast<double>(c) * kLog2E - shift))),
        centre(splat(c)) {}

  static constexpr double unit() { return 1.0; }

  static inline vfloat power(vfloat y) {
    const vfloat e = exp2_normal(vmax(splat(kLowestExponent), vmin(splat(126.0f), y)));
    const vfloat kept = select(y < splat(kLowestExponent), splat(0.0f), e);
    return select(y == y, kept, y);
  }

  inline void add(KlSums& sums, int k, vfloat x, vfloat ref) const {
    const vfloat e = power(fma(x, scale, minus_shift));
    const vfloat own = power(fma(ref, scale, minus_ref_shift));
    const vint excluded = (ref == splat(-HUGE_VALF)) & (x > splat(-HUGE_VALF));
    const vint silent = (e == splat(0.0f)) | excluded;
    const vfloat v = select(silent, splat(0.0f), fma(ref - x, inverse, centre));
    const vint close = (v <= splat(kNearest)) & (v >= splat(-kNearest)) & ~silent;
    vfloat exp, beyond;
    exponential_beyond(select(close, v, splat(0.0f)), exp, beyond);
    sums.sum[k] += e;
    sums.ref_sum[k] += select(close, e * exp, own);
    sums.tilt[k] = fma(e, v, sums.tilt[k]);
    sums.excess[k] += select(close, e * beyond, own - e - e * v);
    sums.impossible |= excluded;
  }
};

template <class Entries, class Type>
KlStats block_sums(const KlBlock<Type>& block, float shift, float centre) {
  using Element = typename Type::Element;
  const Entries entries(block.scale, shift, centre);
  KlSums sums;
  constexpr int64_t kPerStep = Type::kPerVector * (KlSums::kChains / Type::kVectors);
  vfloat x[KlSums::kChains], ref[KlSums::kChains];
  int64_t i = 0;
  for (; i + kPerStep <= block.count; i += kPerStep) {
    for (int k = 0; k < KlSums::kChains; k += Type::kVectors) {
      const int64_t at = i + k / Type::kVectors * Type::kPerVector;
      Type::read(block.x + at, x + k);
      Type::read(block.ref + at, ref + k);
      __builtin_prefetch(reinterpret_cast<const char*>(block.x + at) + kPrefetchBytes);
      __builtin_prefetch(reinterpret_cast<const char*>(block.ref + at) + kPrefetchBytes);
    }
    for (int k = 0; k < KlSums::kChains; ++k) entries.add(sums, k, x[k], ref[k]);
  }
  for (; i < block.count; i += Type::kPerVector) {
    Element padded[2][Type::kPerVector];
    for (int64_t j = 0; j < Type::kPerVector; ++j) {
      if (i + j < block.count) {
        padded[0][j] = block.x[i + j];
        padded[1][j] = block.ref[i + j];
      } else {
        Type::set(padded[0] + j, kPadding);
        Type::set(padded[1] + j, kPadding);
      }
    }
    Type::read(padded[0], x);
    Type::read(padded[1], ref);
    for (int k = 0; k < Type::kVectors; ++k) entries.add(sums, k, x[k], ref[k]);
  }
  const float highest = max_lanes(vmax(sums.highest[0], sums.highest[1]));
  KlStats stats = sums.total(shift, centre, Entries::unit());
  // Where exp(v) was out of reach, or the shift too low, the sums are void; so are NaN and infinity.
  if (highest > kNearest || !(stats.sum <= kTooHigh) || !(stats.ref_sum <= kTooHigh)) {
    stats.excess = NAN;
  }
  return stats;
}

// Whether the terms of `excess` are about another centre than the block's own.
inline bool off_centre(const KlStats& stats) {
  if (!(stats.sum > 0.0 && stats.ref_sum > 0.0)) return false;
  const double about_centre = stats.excess / stats.sum;
  return about_centre > kRounding && stats.divergence() * kOffCentre < about_centre;
}

template <class Entries, class Type>
KlStats centred_sums(const KlBlock<Type>& block, float shift, float& centre) {
  KlStats stats = block_sums<Entries>(block, shift, centre);
  if (!stats.infinite && off_centre(stats)) {
    centre += static_cast<float>(std::log(stats.sum / stats.ref_sum));
    stats = block_sums<Entries>(block, shift, centre);
  }
  return stats;
}

// Shift and centre are those of the block before, and are left for the next.
template <class Type>
KlStats add_block(const KlBlock<Type>& block, float& shift, float& centre) {
  const KlStats stats = centred_sums<CommonEntries>(block, shift, centre);
  if (stats.excess - stats.excess == 0.0) return stats;
  const float best = max_of<Type>(block.x, block.count) * block.scale.log2;
  const float ref_best = max_of<Type>(block.ref, block.count) * block.scale.log2;
  if (best > -HUGE_VALF) shift = best;
  float own = ref_best > -HUGE_VALF
                  ? static_cast<float>((static_cast<double>(shift) - ref_best) * kLn2)
                  : 0.0f;
  const KlStats any = centred_sums<AnyEntries>(block, shift, own);
  if (own - own == 0.0f) centre = own;
  if (shift - shift != 0.0f) shift = 0.0f;
  return any;
}

template <class Type>
KlStats segment_stats(const KlBlock<Type>& segment) {
  float shift = 0.0f, centre = 0.0f;
  const KlBlock<Type> probe{segment.x, segment.ref, smaller(segment.count, kProbe), segment.scale};
  const float first = max_of<Type>(probe.x, probe.count);
  if (first > -HUGE_VALF && first < HUGE_VALF) {
    shift = first * segment.scale.log2 - kCentre;
    const KlStats stats = block_sums<CommonEntries>(probe, shift, 0.0f);
    if (stats.excess - stats.excess == 0.0) {
      centre = static_cast<float>(std::log(stats.sum / stats.ref_sum));
    }
  }
  KlStats total;
  for (int64_t begin = 0; begin < segment.count; begin += kBlock) {
    const KlBlock<Type> block{segment.x + begin, segment.ref + begin,
                              smaller(kBlock, segment.count - begin), segment.scale};
    merge(total, add_block(block, shift, centre));
  }
  return total;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
