// The recurrence of GAE over the tokens of one row, from its last to its first.
//
//   delta_t = r_t + gamma*V_{t+1} - V_t;  A_t = delta_t + gamma*lambda*A_{t+1};  return_t = A_t + V_t
//
// where t+1 is the next VALID token. The recurrence is serial, 4 to 8 cycles per token if written so.
// Masks come in long runs, so a whole vector of tokens is almost always all valid or all masked:
//   all valid    a Hillis-Steele suffix scan in registers; the coefficients are powers of gamma*lambda,
//                known beforehand, so a step is one shuffle and one multiply-add, and the chain from
//                vector to vector is a single multiply-add
//   all masked   zeros; the carried value and advantage pass through
//   mixed        the same scan with the coefficients carried along
#pragma once

#include "cpu/vec.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

// shift(x, next, level): with K = 2^level, lane i takes lane i + K of x, and the last K lanes take the
// first K of `next`. Every call has a constant level, so the switch vanishes.
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define RLHF_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RLHF_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif

#if defined(__AVX512F__)
constexpr int kShifts = 4;
template <class V>
inline V shift(V x, V next, int level) {
  switch (level) {
    case 0:
      return RLHF_FAST_SHUFFLE(x, next, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    case 1:
      return RLHF_FAST_SHUFFLE(x, next, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17);
    case 2:
      return RLHF_FAST_SHUFFLE(x, next, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19);
    default:
      return RLHF_FAST_SHUFFLE(x, next, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                               23);
  }
}
#elif defined(__AVX2__)
constexpr int kShifts = 3;
template <class V>
inline V shift(V x, V next, int level) {
  switch (level) {
    case 0: return RLHF_FAST_SHUFFLE(x, next, 1, 2, 3, 4, 5, 6, 7, 8);
    case 1: return RLHF_FAST_SHUFFLE(x, next, 2, 3, 4, 5, 6, 7, 8, 9);
    default: return RLHF_FAST_SHUFFLE(x, next, 4, 5, 6, 7, 8, 9, 10, 11);
  }
}
#else
constexpr int kShifts = 2;
template <class V>
inline V shift(V x, V next, int level) {
  if (level == 0) return RLHF_FAST_SHUFFLE(x, next, 1, 2, 3, 4);
  return RLHF_FAST_SHUFFLE(x, next, 2, 3, 4, 5);
}
#endif

struct Decay {
  float gamma;
  float step[4];        // (gamma*lambda)^1, ^2, ^4, ^8
  float carry[kLanes];  // lane i: (gamma*lambda)^(kLanes - i)
};

inline Decay make_decay(float gamma, float gae_lambda) {
  Decay decay;
  const double rate = static_cast<double>(gamma) * gae_lambda;
  decay.gamma = gamma;
  double power = rate;
  for (int i = 0; i < 4; ++i, power *= power) decay.step[i] = static_cast<float>(power);
  power = 1.0;
  for (int lane = kLanes - 1; lane >= 0; --lane) {
    power *= rate;
    decay.carry[lane] = static_cast<float>(power);
  }
  return decay;
}

// What one row hands from a chunk to the chunk before it.
struct Carry {
  float value;            // V of the next valid token, or the bootstrap
  float advantage;        // A of the next valid token
  bool end_seen = false;  // the last valid token lies behind us
};

struct Chunk {
  const float* rewards;
  const float* values;
  const uint8_t* mask;  // null: all valid
  float* advantages;
  float* returns;
};

inline void scan_token(const Chunk& chunk, int64_t i, const Decay& decay, Carry& carry) {
  if (chunk.mask != nullptr && chunk.mask[i] == 0) {
    chunk.advantages[i] = 0.0f;
    chunk.returns[i] = 0.0f;
    return;
  }
  const float value = chunk.values[i];
  const float delta = chunk.rewards[i] + decay.gamma * carry.value - value;
  carry.advantage = delta + decay.step[0] * carry.advantage;
  carry.value = value;
  chunk.advantages[i] = carry.advantage;
  chunk.returns[i] = carry.advantage + value;
}

inline void scan_valid_vector(const Chunk& chunk, int64_t i, const Decay& decay, Carry& carry) {
  const vfloat values = load(chunk.values + i);
  const vfloat next_values = shift(values, splat(carry.value), 0);
  vfloat x = load(chunk.rewards + i) + decay.gamma * next_values - values;
#pragma GCC unroll 4
  for (int level = 0; level < kShifts; ++level) {
    x += decay.step[level] * shift(x, vfloat{}, level);
  }
  x += load(decay.carry) * carry.advantage;
  carry.advantage = x[0];
  carry.value = values[0];
  store(chunk.advantages + i, x);
  store(chunk.returns + i, x + values);
}

// The same with holes: the next valid value is itself found by a scan, and the coefficients of the
// recurrence (1 on masked tokens) are multiplied along.
inline void scan_mixed_vector(const Chunk& chunk, int64_t i, const Decay& decay, Carry& carry) {
  vint valid;
  for (int lane = 0; lane < kLanes; ++lane) valid[lane] = chunk.mask[i + lane];
  valid = valid != 0;
  const vint yes = vint{} == 0;
  const vfloat zero = {}, one = splat(1.0f), carried = splat(carry.value);
  const vfloat values = valid ? load(chunk.values + i) : zero;
  vfloat next_values = shift(values, carried, 0);
  vint known = shift(valid, yes, 0);
#pragma GCC unroll 4
  for (int level = 0; level < kShifts; ++level) {
    next_values = known ? next_values : shift(next_values, carried, level);
    known = known | shift(known, yes, level);
  }
  vfloat x = valid ? load(chunk.rewards + i) + decay.gamma * next_values - values : zero;
  vfloat a = valid ? splat(decay.step[0]) : one;
#pragma GCC unroll 4
  for (int level = 0; level < kShifts; ++level) {
    x += a * shift(x, zero, level);
    a *= shift(a, one, level);
  }
  x += a * carry.advantage;
  carry.advantage = x[0];
  carry.value = valid[0] ? values[0] : next_values[0];
  store(chunk.advantages + i, valid ? x : zero);
  store(chunk.returns + i, valid ? x + values : zero);
}

enum class Run { valid, masked, mixed };

inline Run classify(const uint8_t* mask) {
  uint8_t ones[kLanes], zeros[kLanes];
  std::memset(ones, 1, kLanes);
  std::memset(zeros, 0, kLanes);
  if (std::memcmp(mask, ones, kLanes) == 0) return Run::valid;
  return std::memcmp(mask, zeros, kLanes) == 0 ? Run::masked : Run::mixed;
}

inline void scan_chunk(const Chunk& chunk, int64_t count, const Decay& decay, Carry& carry) {
  int64_t i = count;
  for (; i >= kLanes; i -= kLanes) {
    const int64_t first = i - kLanes;
    const Run run = chunk.mask == nullptr ? Run::valid : classify(chunk.mask + first);
    if (run == Run::valid) {
      scan_valid_vector(chunk, first, decay, carry);
    } else if (run == Run::masked) {
      store(chunk.advantages + first, vfloat{});
      store(chunk.returns + first, vfloat{});
    } else {
      scan_mixed_vector(chunk, first, decay, carry);
    }
  }
  while (--i >= 0) scan_token(chunk, i, decay, carry);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
