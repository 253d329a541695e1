// One pass per row, from its last token to its first, in chunks that stay in the first-level cache:
// KL, rewards, the recurrence (cpu/gae_scan.h) and the moments of the advantages, each a sweep over the
// chunk while it is hot.
#include "cpu/rewards_and_gae.h"

#include <cmath>

#include "cpu/gae_scan.h"
#include "cpu/moments.h"
#include "cpu/vec.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kTokensPerTask = 8192;
constexpr int64_t kSingleThreadTokens = 16384;

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

// kl_of(i): the KL of token i, whatever its mask.
template <class KlOf>
void fill_kl(const uint8_t* __restrict mask, float coefficient, int64_t count,
             float* __restrict kl, float* __restrict rewards, const KlOf& kl_of) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = kl_of(i);
    const bool valid = mask[i] != 0;
    kl[i] = valid ? value : 0.0f;
    rewards[i] = valid ? -coefficient * value : 0.0f;
  }
}

inline int64_t segment_offset(const RewardsAndGaeArgs& args, int64_t segment) {
  if (args.wide_offsets) return static_cast<const int64_t*>(args.cu_seqlens)[segment];
  return static_cast<const int32_t*>(args.cu_seqlens)[segment];
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
    const int64_t start = packed ? segment_offset(args_, row) : 0;
    const int64_t length = packed ? segment_offset(args_, row + 1) - start : args_.columns;
    const int64_t output = packed ? start : row * args_.columns;
    ShiftedMoments moments;
    for (int64_t end = length; end > 0;) {
      const int64_t begin = larger(0, end - kChunk);
      run_chunk(row, start + begin, output + begin, end - begin, carry, moments);
      end = begin;
    }
    if (args_.out_moments != nullptr) {
      const Moments result = moments.finish();
      std::memcpy(args_.out_moments + 3 * row, &result, sizeof(result));
    }
  }

 private:
  int64_t offset(const View& view, int64_t row, int64_t column) const {
    return (args_.cu_seqlens == nullptr ? row * view.row_stride : 0) + column * view.column_stride;
  }

  void run_chunk(int64_t row, int64_t column, int64_t output, int64_t count, Carry& carry,
                 ShiftedMoments& moments) {
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
    if (args_.out_moments != nullptr) {
      moments.add(chunk.advantages, chunk.mask, count, carry.advantage);
    }
  }

  void make_rewards(int64_t row, int64_t column, int64_t output, int64_t count, const uint8_t* mask,
                    Carry& carry) {
    float* rewards = args_.out_rewards + output;
    make_kl(row, column, count, mask, args_.out_kl + output, rewards);
    if (args_.scores_per_token) {
      const float* scores =
          read_row(args_.scores, offset(args_.scores, row, column), count, scores_);
      for (int64_t i = 0; i < count; ++i) {
        const float score = clamp(scores[i], args_.reward_clip);
        rewards[i] += (mask == nullptr || mask[i] != 0) ? score : 0.0f;
      }
    } else if (!carry.end_seen) {
      int64_t last = count - 1;
      while (last >= 0 && mask != nullptr && mask[last] == 0) --last;
      if (last >= 0) {
        const float score = read_one(args_.scores, row * args_.scores.row_stride);
        rewards[last] += clamp(score, args_.reward_clip);
        carry.end_seen = true;
      }
    }
  }

  void make_kl(int64_t row, int64_t column, int64_t count, const uint8_t* mask, float* kl,
               float* rewards) {
    const uint8_t* valid = mask == nullptr ? all_true_ : mask;
    const float coefficient = args_.kl_in_reward ? args_.kl_coef : 0.0f;
    if (args_.kl.data != nullptr) {
      const float* exact = read_row(args_.kl, offset(args_.kl, row, column), count, old_);
      fill_kl(valid, coefficient, count, kl, rewards, [=](int64_t i) { return exact[i]; });
    } else if (args_.ref_logprobs.data != nullptr) {
      estimate_kl(row, column, count, valid, coefficient, kl, rewards);
    } else {
      std::memset(kl, 0, count * sizeof(float));
    }
    const bool penalised = args_.kl_in_reward && (args_.kl.data != nullptr ||
                                                  args_.ref_logprobs.data != nullptr);
    if (!penalised) std::memset(rewards, 0, count * sizeof(float));  // 0*inf would be NaN
  }

  void estimate_kl(int64_t row, int64_t column, int64_t count, const uint8_t* valid,
                   float coefficient, float* kl, float* rewards) {
    const float* old_logprobs =
        read_row(args_.old_logprobs, offset(args_.old_logprobs, row, column), count, old_);
    const float* ref_logprobs =
        read_row(args_.ref_logprobs, offset(args_.ref_logprobs, row, column), count, ref_);
    const float bound = args_.log_ratio_clamp;
    const auto log_ratio = [=](int64_t i) {
      return clamp(old_logprobs[i] - ref_logprobs[i], bound);
    };
    switch (args_.kl_estimator) {
      case KlEstimator::k1:
        fill_kl(valid, coefficient, count, kl, rewards, log_ratio);
        break;
      case KlEstimator::k2:
        fill_kl(valid, coefficient, count, kl, rewards, [=](int64_t i) {
          const float d = log_ratio(i);
          return 0.5f * d * d;
        });
        break;
      case KlEstimator::k3:
        fill_kl(valid, coefficient, count, kl, rewards,
                [=](int64_t i) { return k3(log_ratio(i)); });
        break;
    }
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
