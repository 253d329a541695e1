// The sweeps over a row of logits that sampling is made of: sums and race, and what lies above a value.
//
// A row is cut into at most kMaxSegments segments of whole groups; segments are combined in order, so
// a result depends on the row alone. Within a group sums are fp32 per lane, across groups fp64.
#pragma once

#include <cmath>

#include "cpu/logit_sums.h"
#include "cpu/philox.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

// One call of Philox serves the ids b, b + 1024, b + 2048 and b + 3072 of a group of 4096, so that four
// vectors of consecutive ids take four vectors of words without a shuffle.
inline constexpr int64_t kWordStride = 1024;
inline constexpr int64_t kGroup = 4 * kWordStride;
inline constexpr int64_t kMaxSegments = 64;
inline constexpr int kThresholds = 3;
inline constexpr float kShortestWait = 0x1p-33f;  // the smallest Exp(1) variable that 32 bits can give
// No token of less mass, relative to the best, beats the best one's longest wait (23). Padding and -inf,
// of mass 2^-125, lie below, so what is not there is never looked at.
inline constexpr float kHopeless = 0x1p-60f;

// What leads the exponential race: the largest p / E, where p is relative to that of the best token.
struct Leader {
  double ratio = 0.0;
  int64_t id = -1;

  void challenge(double other_ratio, int64_t other_id) {
    if (other_ratio < ratio || (other_ratio == ratio && other_id >= id)) return;
    ratio = other_ratio;
    id = other_id;
  }
};

struct Sums {
  double mass = 0.0;      // sum of 2^y
  double weighted = 0.0;  // sum of y 2^y
  Leader leader;

  void add(const Sums& next) {
    mass += next.mass;
    weighted += next.weighted;
    if (next.leader.id >= 0) leader.challenge(next.leader.ratio, next.leader.id);
  }
};

// y = (x - best) * scale is log2 of p relative to the best token. The difference comes first: at a
// temperature of 1e-30 nothing else survives the rounding.
template <class Type>
struct Row {
  const typename Type::Element* x;
  int64_t vocab;
  double scale;  // log2(e) / temperature
  Philox philox;
  float best = -HUGE_VALF;
  // Kept are x above `threshold`, and equal ones up to id `last_tie`, with y at least `lowest`.
  float threshold = -HUGE_VALF;
  int64_t last_tie = INT64_MAX;
  float lowest = -HUGE_VALF;

  double log2_p(int64_t id) const {
    return (static_cast<double>(Type::get(x + id)) - static_cast<double>(best)) * scale;
  }

  int64_t segment_length() const {
    const int64_t share = (vocab + kMaxSegments - 1) / kMaxSegments;
    return larger(kSegment, (share + kGroup - 1) / kGroup * kGroup);
  }
};

// The `count` (perhaps none, perhaps too many) entries at `x`, padded with -inf to whole vectors.
template <class Type>
inline void read_padded(const typename Type::Element* x, int64_t count, vfloat* value) {
  if (count >= Type::kPerVector) return Type::read(x, value);
  typename Type::Element padded[Type::kPerVector];
  for (int64_t j = 0; j < Type::kPerVector; ++j) padded[j] = j < count ? x[j] : Type::lowest();
  Type::read(padded, value);
}

// 2^y, and in `moved` y + kCentre, which does not fall below where 2^y is far beneath any sum.
inline vfloat mass_of(vfloat x, vfloat best, vfloat scale, vfloat& moved) {
  moved = vmax(splat(kLowestExponent), fma(x - best, scale, splat(kCentre)));
  return exp2_centred(moved);
}

// Ids whose word and mass say that they may overtake the leader. An Exp(1) variable E = -log(1 - v) is
// at least v, so v * ratio < p is necessary; after a few vectors hardly an id passes, and only
// those that do cost a logarithm, in fp64.
template <class Type>
void challenge(const Row<Type>& row, int64_t first_id, vfloat mass, vint words, vint possible,
               Leader& leader) {
  for (uint32_t bits = lane_bits(possible); bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    const double v = (static_cast<double>(static_cast<uint32_t>(words[lane])) + 0.5) * 0x1p-32;
    if (v * leader.ratio > static_cast<double>(mass[lane]) * 1.00001) continue;
    const int64_t id = first_id + Type::kVectors * lane;
    leader.challenge(std::exp2(row.log2_p(id)) / -std::log1p(-v), id);
  }
}

// Four vectors of ids `first_id` + {0, 1024, 2048, 3072} + kVectors * lane.
template <class Type>
inline void race(const Row<Type>& row, int64_t first_id, vint counters, const vfloat* mass,
                 Leader& leader) {
  // Rounded down, and the right side up: the fp64 comparison above decides.
  const float ratio = static_cast<float>(leader.ratio * 0.99999);
  const vfloat most = vmax(vmax(mass[0], mass[1]), vmax(mass[2], mass[3]));
  if (lane_bits(most > splat(ratio * kShortestWait)) == 0) return;
  vint words[4], possible[4];
  row.philox.words(counters, words);
  vint any{};
  for (int w = 0; w < 4; ++w) {
    const vfloat v = from_unsigned(words[w]) * splat(0x1p-32f);
    possible[w] = (v * splat(ratio) < mass[w] * splat(1.00001f)) & (mass[w] > splat(kHopeless));
    any |= possible[w];
  }
  if (lane_bits(any) == 0) return;
  for (int w = 0; w < 4; ++w) {
    challenge(row, first_id + w * kWordStride, mass[w], words[w], possible[w], leader);
  }
}

template <class Type>
inline vfloat kept_mass(const Row<Type>& row, vint ids, vfloat x, vfloat mass) {
  const vfloat threshold = splat(row.threshold);
  const int32_t last = static_cast<int32_t>(smaller(row.last_tie, INT32_MAX));
  const vint tie = (x == threshold) & (ids <= vint{} + last);
  const vfloat y = (x - splat(row.best)) * splat(static_cast<float>(row.scale));
  const vint keep = ((x > threshold) | tie) & (y >= splat(row.lowest));
  return from_bits(keep & as_bits(mass));
}

// Sums over ids [begin, end) and, if `racing`, the race; of the kept ids alone if kFiltered.
template <class Type, bool kFiltered>
Sums sweep(const Row<Type>& row, int64_t begin, int64_t end, bool racing) {
  const vfloat best = splat(row.best), scale = splat(static_cast<float>(row.scale));
  Sums result;
  for (int64_t group = begin; group < end; group += kGroup) {
    vfloat sum[4] = {}, weighted[4] = {};
    const int64_t rows = smaller(kWordStride, end - group);
    // The last group may be short: what would be padding alone is not read.
    const int words = static_cast<int>(smaller(4, (end - group + kWordStride - 1) / kWordStride));
    vfloat mass[Type::kVectors][4] = {};
    for (int64_t b = 0; b < rows; b += Type::kPerVector) {
      vfloat value[4][Type::kVectors];
      for (int w = 0; w < words; ++w) {
        const int64_t id = group + w * kWordStride + b;
        read_padded<Type>(row.x + id, end - id, value[w]);
        for (int k = 0; k < Type::kVectors; ++k) {
          vfloat moved;
          vfloat p = mass_of(value[w][k], best, scale, moved);
          if (kFiltered) {
            const vint ids = lane_numbers(static_cast<int32_t>(id + k), Type::kVectors);
            p = kept_mass(row, ids, value[w][k], p);
          }
          sum[w] += p;
          weighted[w] = fma(moved, p, weighted[w]);
          mass[k][w] = p;
        }
      }
      if (!racing) continue;
      for (int k = 0; k < Type::kVectors; ++k) {
        const int32_t counter = static_cast<int32_t>(group / 4 + b + k);
        race(row, group + b + k, lane_numbers(counter, Type::kVectors), mass[k], result.leader);
      }
    }
    const double total = add_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    result.mass += total;
    result.weighted +=
        add_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) - kCentre * total;
  }
  return result;
}

// For each threshold the number of entries above it, or their mass.
template <class Type, bool kMass>
void sum_above(const Row<Type>& row, int64_t begin, int64_t end, const float* thresholds,
               double* sums) {
  const vfloat best = splat(row.best), scale = splat(static_cast<float>(row.scale));
  vfloat t[kThresholds];
  for (int j = 0; j < kThresholds; ++j) t[j] = splat(thresholds[j]), sums[j] = 0.0;
  for (int64_t group = begin; group < end; group += kGroup) {
    const int64_t stop = smaller(end, group + kGroup);
    vfloat mass[kThresholds] = {};
    vint count[kThresholds] = {};
    for (int64_t i = group; i < stop; i += Type::kPerVector) {
      vfloat value[Type::kVectors];
      read_padded<Type>(row.x + i, stop - i, value);
      for (const vfloat& x : value) {
        vfloat p, moved;
        if (kMass) p = mass_of(x, best, scale, moved);
        for (int j = 0; j < kThresholds; ++j) {
          const vint above = x > t[j];
          if (kMass) {
            mass[j] += from_bits(above & as_bits(p));
          } else {
            count[j] -= above;
          }
        }
      }
    }
    for (int j = 0; j < kThresholds; ++j) {
      sums[j] += add_lanes(kMass ? mass[j] : __builtin_convertvector(count[j], vfloat));
    }
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
