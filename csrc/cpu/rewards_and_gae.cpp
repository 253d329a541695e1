// One pass per row, from its last token to its first, in chunks that stay in the first-level cache:
//
//   d_t = old_logprob_t - ref_logprob_t;  kl_t = k(d_t);  r_t = -kl_coef*kl_t (+ score at the end)
//   delta_t = r_t + gamma*V_{t+1} - V_t;  A_t = delta_t + gamma*lambda*A_{t+1};  return_t = A_t + V_t
//
// where t+1 is the next VALID token. The recurrence is serial, 4 to 8 cycles per token if written so.
// Masks come in long runs, so a whole vector of tokens is almost always all valid or all masked:
//   all valid    a Hillis-Steele suffix scan in registers; the coefficients are powers of gamma*lambda,
//                known beforehand, so a step is one shuffle and one multiply-add, and the chain from
//                vector to vector is a single multiply-add
//   all masked   zeros; the carried value and advantage pass through
//   mixed        the same scan with the coefficients carried along
#include "cpu/rewards_and_gae.h"

#include <cmath>

#include "cpu/vec.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kTokensPerTask = 8192;
constexpr int64_t kSingleThreadTokens = 16384;

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

Decay make_decay(float gamma, float gae_lambda) {
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

void scan_chunk(const Chunk& chunk, int64_t count, const Decay& decay, Carry& carry) {
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

inline float clamp(float d, float bound) {
  const float low = d < -bound ? -bound : d;  // written so that NaN stays NaN
  return low > bound ? bound : low;
}

// exp(-d) - 1 + d without the cancellation near 0, where the KL of a healthy run lives: a Taylor
// polynomial below 0.5 (error under one fp32 ulp there), exp beyond.
inline float k3(float d) {
  const float y = -d;
  float series = 1.0f / 3628800.0f;
  series = series * y + 1.0f / 362880.0f;
  series = series * y + 1.0f / 40320.0f;
  series = series * y + 1.0f / 5040.0f;
  series = series * y + 1.0f / 720.0f;
  series = series * y + 1.0f / 120.0f;
  series = series * y + 1.0f / 24.0f;
  series = series * y + 1.0f / 6.0f;
  series = series * y + 0.5f;
  series = series * y * y;
  // exp(y) = 2^n * e^f with n = round(y/ln 2); beyond the range of float the ends below take over.
  const float bounded = y > 88.0f ? 88.0f : (y < -87.0f ? -87.0f : y);
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5*2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float f = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040.0f;
  e = e * f + 1.0f / 720.0f;
  e = e * f + 1.0f / 120.0f;
  e = e * f + 1.0f / 24.0f;
  e = e * f + 1.0f / 6.0f;
  e = e * f + 0.5f;
  e = e * f + 1.0f;
  e = e * f + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t scale_bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  float far = e * scale - 1.0f - y;
  far = y > 88.0f ? INFINITY : far;
  far = y != y ? y : far;
  return (y < 0.5f && y > -0.5f) ? series : far;
}

template <class Estimator>
void fill_kl(const float* __restrict old_logprobs, const float* __restrict ref_logprobs,
             const uint8_t* __restrict mask, float clamp_at, float coefficient, int64_t count,
             float* __restrict kl, float* __restrict rewards, const Estimator& estimator) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = estimator(clamp(old_logprobs[i] - ref_logprobs[i], clamp_at));
    const bool valid = mask[i] != 0;
    kl[i] = valid ? value : 0.0f;
    rewards[i] = valid ? -coefficient * value : 0.0f;
  }
}

class RowWorker {
 public:
  explicit RowWorker(const RewardsAndGaeArgs& args)
      : args_(args), decay_(make_decay(args.gamma, args.gae_lambda)) {
    std::memset(all_true_, 1, sizeof(all_true_));
  }

  void run(int64_t row) {
    Carry carry;
    carry.value = args_.bootstrap.data == nullptr
                      ? 0.0f
                      : read_one(args_.bootstrap, row * args_.bootstrap.row_stride);
    carry.advantage = 0.0f;
    const bool packed = args_.cu_seqlens != nullptr;
    const int64_t start = packed ? args_.cu_seqlens[row] : 0;
    const int64_t length = packed ? args_.cu_seqlens[row + 1] - start : args_.columns;
    const int64_t output = packed ? start : row * args_.columns;
    for (int64_t end = length; end > 0;) {
      const int64_t begin = larger(0, end - kChunk);
      run_chunk(row, start + begin, output + begin, end - begin, carry);
      end = begin;
    }
  }

 private:
  int64_t offset(const View& view, int64_t row, int64_t column) const {
    return (args_.cu_seqlens == nullptr ? row * view.row_stride : 0) + column * view.column_stride;
  }

  void run_chunk(int64_t row, int64_t column, int64_t output, int64_t count, Carry& carry) {
    Chunk chunk;
    chunk.mask = nullptr;
    if (args_.mask.data != nullptr) {
      const int64_t row_offset = args_.cu_seqlens == nullptr ? row * args_.mask.row_stride : 0;
      chunk.mask = read_mask(args_.mask, row_offset + column * args_.mask.column_stride, count, mask_);
    }
    chunk.values = read_row(args_.values, offset(args_.values, row, column), count, values_);
    if (args_.rewards.data != nullptr) {
      chunk.rewards = read_row(args_.rewards, offset(args_.rewards, row, column), count, rewards_);
    } else {
      chunk.rewards = args_.out_rewards + output;
      make_rewards(row, column, output, count, chunk.mask, carry);
    }
    chunk.advantages = args_.out_advantages + output;
    chunk.returns = args_.out_returns + output;
    scan_chunk(chunk, count, decay_, carry);
  }

  void make_rewards(int64_t row, int64_t column, int64_t output, int64_t count, const uint8_t* mask,
                    Carry& carry) {
    float* rewards = args_.out_rewards + output;
    make_kl(row, column, count, mask, args_.out_kl + output, rewards);
    if (args_.scores_per_token) {
      const float* scores =
          read_row(args_.scores, offset(args_.scores, row, column), count, scores_);
      for (int64_t i = 0; i < count; ++i) {
        rewards[i] += (mask == nullptr || mask[i] != 0) ? scores[i] : 0.0f;
      }
    } else if (!carry.end_seen) {
      int64_t last = count - 1;
      while (last >= 0 && mask != nullptr && mask[last] == 0) --last;
      if (last >= 0) {
        rewards[last] += read_one(args_.scores, row * args_.scores.row_stride);
        carry.end_seen = true;
      }
    }
  }

  void make_kl(int64_t row, int64_t column, int64_t count, const uint8_t* mask, float* kl,
               float* rewards) {
    if (args_.ref_logprobs.data == nullptr) {
      std::memset(kl, 0, count * sizeof(float));
      std::memset(rewards, 0, count * sizeof(float));
      return;
    }
    const float* old_logprobs =
        read_row(args_.old_logprobs, offset(args_.old_logprobs, row, column), count, old_);
    const float* ref_logprobs =
        read_row(args_.ref_logprobs, offset(args_.ref_logprobs, row, column), count, ref_);
    const uint8_t* valid = mask == nullptr ? all_true_ : mask;
    const float coefficient = args_.kl_in_reward ? args_.kl_coef : 0.0f;
    const float bound = args_.log_ratio_clamp;
    switch (args_.kl_estimator) {
      case KlEstimator::k1:
        fill_kl(old_logprobs, ref_logprobs, valid, bound, coefficient, count, kl, rewards,
                [](float d) { return d; });
        break;
      case KlEstimator::k2:
        fill_kl(old_logprobs, ref_logprobs, valid, bound, coefficient, count, kl, rewards,
                [](float d) { return 0.5f * d * d; });
        break;
      case KlEstimator::k3:
        fill_kl(old_logprobs, ref_logprobs, valid, bound, coefficient, count, kl, rewards,
                [](float d) { return k3(d); });
        break;
    }
    if (!args_.kl_in_reward) std::memset(rewards, 0, count * sizeof(float));  // 0*inf would be NaN
  }

  const RewardsAndGaeArgs& args_;
  const Decay decay_;
  float rewards_[kChunk], values_[kChunk], old_[kChunk], ref_[kChunk], scores_[kChunk];
  uint8_t mask_[kChunk], all_true_[kChunk];
};

}  // namespace

void rewards_and_gae(const RewardsAndGaeArgs& args) {
  if (args.rows == 0) return;
  const int64_t mean_length = larger(1, args.tokens / args.rows);
  const int64_t grain = larger(1, kTokensPerTask / mean_length);
  const int threads = args.tokens <= kSingleThreadTokens ? 1 : args.threads;
  float* const outputs[] = {args.out_rewards, args.out_kl, args.out_advantages, args.out_returns};
  for (float* out : outputs) {
    if (out != nullptr) advise_huge_pages(out, args.tokens * static_cast<int64_t>(sizeof(float)));
  }
  parallel_for(args.rows, grain, threads, [&args](int64_t begin, int64_t end) {
    RowWorker worker(args);
    for (int64_t row = begin; row < end; ++row) worker.run(row);
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
