// The tokens of one row as a thread of rewards_and_gae_kernel reads, rewards and writes them.
#pragma once

#include <cuda_runtime.h>

#include "cpu/rewards_and_gae.h"

namespace rlhf_fast {
namespace {

constexpr int kItems = 4;  // consecutive tokens of a thread

__device__ __forceinline__ float read(const View& view, int64_t offset) {
  if (view.dtype == DType::f32) return __ldg(static_cast<const float*>(view.data) + offset);
  const unsigned bits = __ldg(static_cast<const unsigned short*>(view.data) + offset);
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float clamp(float x, float bound) {
  x = x < -bound ? -bound : x;  // written so that NaN stays NaN
  return x > bound ? bound : x;
}

__device__ __forceinline__ float kl_estimate(float d, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1: return d;
    case KlEstimator::k2: return 0.5f * d * d;
    default: break;
  }
  // exp(-d) - 1 + d; the Taylor polynomial avoids the cancellation near 0.
  const float y = -d;
  if (fabsf(y) < 0.5f) {
    float series = 1.0f / 3628800.0f;
    series = fmaf(series, y, 1.0f / 362880.0f);
    series = fmaf(series, y, 1.0f / 40320.0f);
    series = fmaf(series, y, 1.0f / 5040.0f);
    series = fmaf(series, y, 1.0f / 720.0f);
    series = fmaf(series, y, 1.0f / 120.0f);
    series = fmaf(series, y, 1.0f / 24.0f);
    series = fmaf(series, y, 1.0f / 6.0f);
    series = fmaf(series, y, 0.5f);
    return series * y * y;
  }
  return expm1f(y) - y;
}

// kItems consecutive tokens.
struct Tokens {
  bool valid[kItems];
  float value[kItems];
  float reward[kItems];
  float kl[kItems];
};

// kVector: rows are padded and every group of kItems tokens is aligned, dense, and either inside the
// row or outside: one load of 16 bytes (8 of bf16, 4 of the mask) and one store of 16.
template <bool kVector>
class GaeRow {
 public:
  __device__ GaeRow(const RewardsAndGaeArgs& args, int64_t row) : args_(args), row_(row) {
    packed_ = !kVector && args.cu_seqlens != nullptr;
    start_ = packed_ ? segment_offset(row) : 0;
    length_ = packed_ ? segment_offset(row + 1) - start_ : args.columns;
    output_ = packed_ ? start_ : row * args.columns;
  }

  __device__ int64_t length() const { return length_; }
  __device__ bool score_at_end() const {
    return args_.rewards.data == nullptr && !args_.scores_per_token;
  }
  __device__ float sequence_score() const {
    return clamp(read(args_.scores, row_ * args_.scores.row_stride), args_.reward_clip);
  }
  __device__ float bootstrap() const {
    if (args_.bootstrap.data == nullptr) return 0.0f;
    return read(args_.bootstrap, row_ * args_.bootstrap.row_stride);
  }

  // Positions outside the row count as masked, so they change nothing.
  __device__ void load(int64_t first, Tokens& tokens) const {
    load_mask(first, tokens);
    load_floats(args_.values, first, tokens, tokens.value);
    if (args_.rewards.data != nullptr) {
      load_floats(args_.rewards, first, tokens, tokens.reward);
      return;
    }
    load_kl(first, tokens);
    float score[kItems] = {};
    if (args_.scores_per_token) load_floats(args_.scores, first, tokens, score);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool penalised = args_.kl_in_reward && tokens.valid[k];
      const float penalty = penalised ? -args_.kl_coef * tokens.kl[k] : 0.0f;
      tokens.reward[k] = penalty + clamp(score[k], args_.reward_clip);
    }
    store(args_.out_kl, first, tokens.kl);
  }

  __device__ void write(int64_t first, const Tokens& tokens,
                        const float (&advantage)[kItems]) const {
    float returns[kItems], advantages[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      advantages[k] = tokens.valid[k] ? advantage[k] : 0.0f;
      returns[k] = tokens.valid[k] ? advantage[k] + tokens.value[k] : 0.0f;
    }
    store(args_.out_advantages, first, advantages);
    store(args_.out_returns, first, returns);
    if (args_.out_rewards != nullptr) store(args_.out_rewards, first, tokens.reward);
  }

 private:
  __device__ int64_t segment_offset(int64_t segment) const {
    if (args_.wide_offsets) return static_cast<const int64_t*>(args_.cu_seqlens)[segment];
    return static_cast<const int32_t*>(args_.cu_seqlens)[segment];
  }
  __device__ int64_t offset(int64_t row_stride, int64_t column_stride, int64_t t) const {
    return (packed_ ? 0 : row_ * row_stride) + (start_ + t) * column_stride;
  }

  __device__ void load_mask(int64_t first, Tokens& tokens) const {
    const MaskView& mask = args_.mask;
    const int64_t at = offset(mask.row_stride, mask.column_stride, first);
    unsigned bytes = 0x01010101u;
    if (kVector && mask.data != nullptr && first < length_) {
      bytes = __ldg(reinterpret_cast<const unsigned*>(mask.data + at));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      bool valid = first + k < length_;
      if (kVector) {
        valid = valid && ((bytes >> (8 * k)) & 0xffu) != 0;
      } else if (valid && mask.data != nullptr) {
        valid = mask.data[at + k * mask.column_stride] != 0;
      }
      tokens.valid[k] = valid;
    }
  }

  // 0 where a token does not count.
  __device__ void load_floats(const View& view, int64_t first, const Tokens& tokens,
                              float (&out)[kItems]) const {
    const int64_t at = offset(view.row_stride, view.column_stride, first);
    if (kVector && first < length_) {
      if (view.dtype == DType::f32) {
        const float4 x =
            __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(view.data) + at));
        out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
      } else {
        const uint2 x =
            __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(view.data) + at));
        out[0] = __uint_as_float(x.x << 16), out[1] = __uint_as_float(x.x & 0xffff0000u);
        out[2] = __uint_as_float(x.y << 16), out[3] = __uint_as_float(x.y & 0xffff0000u);
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!tokens.valid[k]) {
        out[k] = 0.0f;
      } else if (!kVector) {
        out[k] = read(view, at + k * view.column_stride);
      }
    }
  }

  __device__ void load_kl(int64_t first, Tokens& tokens) const {
    if (args_.kl.data != nullptr) {
      load_floats(args_.kl, first, tokens, tokens.kl);
      return;
    }
    float old_logprobs[kItems] = {}, ref_logprobs[kItems] = {};
    if (args_.ref_logprobs.data != nullptr) {
      load_floats(args_.old_logprobs, first, tokens, old_logprobs);
      load_floats(args_.ref_logprobs, first, tokens, ref_logprobs);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      // Both are 0 where there is no reference or the token does not count, and then so is this.
      const float d = clamp(old_logprobs[k] - ref_logprobs[k], args_.log_ratio_clamp);
      tokens.kl[k] = kl_estimate(d, args_.kl_estimator);
    }
  }

  __device__ void store(float* out, int64_t first, const float (&x)[kItems]) const {
    if constexpr (kVector) {
      if (first < length_) {
        *reinterpret_cast<float4*>(out + output_ + first) = make_float4(x[0], x[1], x[2], x[3]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (first + k < length_) out[output_ + first + k] = x[k];
      }
    }
  }

  const RewardsAndGaeArgs& args_;
  int64_t row_, start_, length_, output_;
  bool packed_;
};

}  // namespace
}  // namespace rlhf_fast
