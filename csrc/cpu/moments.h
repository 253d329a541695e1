// Count, mean and sum of squared deviations in fp64, of a run of tokens and of many runs together.
// Eight lanes on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr int kWide = 8;

typedef double vwide __attribute__((vector_size(kWide * 8)));
typedef int64_t vwide_int __attribute__((vector_size(kWide * 8)));
typedef float vwide_float __attribute__((vector_size(kWide * 4)));
typedef uint8_t vwide_byte __attribute__((vector_size(kWide)));

inline double add_lanes(const vwide& lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

inline vwide load_wide(const float* address) {
  vwide_float values;
  std::memcpy(&values, address, sizeof(values));
  return __builtin_convertvector(values, vwide);
}

// All ones in the lanes whose byte is not 0.
inline vwide_int load_valid(const uint8_t* address) {
  vwide_byte bytes;
  std::memcpy(&bytes, address, sizeof(bytes));
  return __builtin_convertvector(bytes, vwide_int) != 0;
}

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;
};
static_assert(sizeof(Moments) == 24, "three doubles");

// The moments of the union of disjoint sets: the mean of all first, then what each set adds to the
// squared deviations from it, so there is one division however many sets there are.
inline Moments merge_moments(const Moments* sets, int64_t number) {
  if (number == 1) return sets[0];
  Moments total;
  double sum = 0.0;
  for (int64_t i = 0; i < number; ++i) {
    total.count += sets[i].count;
    sum += sets[i].count * sets[i].mean;
  }
  if (total.count == 0.0) return total;
  total.mean = sum / total.count;
  for (int64_t i = 0; i < number; ++i) {
    const double difference = sets[i].mean - total.mean;
    total.m2 += sets[i].m2 + sets[i].count * difference * difference;
  }
  return total;
}

// Moments in one pass, by sums of x - shift and of its square. The shift is one of the values, so its
// distance to the mean is at most sqrt(count) standard deviations, and the subtraction at the end
// costs at most a factor of `count` of fp64's precision.
class ShiftedMoments {
 public:
  // Tokens x[0 .. number); mask null: all of them count. `sample` is one of them, if any counts.
  void add(const float* x, const uint8_t* mask, int64_t number, float sample) {
    if (count_ == 0) shift_ = static_cast<double>(sample);
    int64_t i = 0;
    for (; i + kWide <= number; i += kWide) add_vector(x + i, mask == nullptr ? nullptr : mask + i);
    if (i == number) return;
    float x_tail[kWide] = {};
    uint8_t mask_tail[kWide] = {};
    for (int lane = 0; i + lane < number; ++lane) {
      x_tail[lane] = x[i + lane];
      mask_tail[lane] = mask == nullptr ? 1 : mask[i + lane];
    }
    add_vector(x_tail, mask_tail);
  }

  Moments finish() const {
    Moments result;
    if (count_ == 0) return result;
    result.count = static_cast<double>(count_);
    const double sum = add_lanes(sum_);
    const double m2 = add_lanes(squares_) - sum * (sum / result.count);
    result.mean = shift_ + sum / result.count;
    result.m2 = m2 < 0.0 ? 0.0 : m2;  // written so that NaN stays NaN
    return result;
  }

 private:
  void add_vector(const float* x, const uint8_t* mask) {
    vwide d = load_wide(x) - shift_;
    if (mask == nullptr) {
      count_ += kWide;
    } else {
      d = load_valid(mask) ? d : vwide{};
      for (int lane = 0; lane < kWide; ++lane) count_ += mask[lane] != 0;
    }
    sum_ += d;
    squares_ += d * d;
  }

  int64_t count_ = 0;
  double shift_ = 0.0;
  vwide sum_ = {}, squares_ = {};
};

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
