// KL, reward placement and GAE, one block per row, one launch.
//
// A row is walked from its end in tiles of blockDim.x * kItems tokens; thread i owns kItems consecutive
// ones. Per tile:
//
//   1. every thread loads its tokens and makes their rewards;
//   2. "next valid value": the first valid V of each thread, then of each warp (ballot), so that every
//      token knows V_{t+1} across masked steps; a token with no valid one after it in the row is the
//      last true column and receives the sequence's score;
//   3. the recurrence A_t = a_t*A_{t+1} + b_t with (a, b) = (gamma*lambda, delta_t) on valid tokens and
//      (1, 0) on masked ones is a product of affine maps: composed serially in a thread, by a shuffle
//      scan over the warp, and over the warps through shared memory;
//   4. with the advantage of everything behind it, each thread finishes its tokens and writes them.
//
// The order of every sum depends on the block size, which depends on the row length alone: results are
// deterministic and do not change with the rows around them. tests/kernels/test_gae_cuda_algorithm.py
// follows these four steps in NumPy.
#include "cuda/rewards_and_gae.h"

#include <cuda_runtime.h>
#include <math_constants.h>

#include "cuda/device_guard.h"

namespace rlhf_fast {
namespace {

constexpr int kItems = 4;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float read(const View& view, int64_t offset) {
  if (view.dtype == DType::f32) return __ldg(static_cast<const float*>(view.data) + offset);
  const unsigned bits = __ldg(static_cast<const unsigned short*>(view.data) + offset);
  return __uint_as_float(bits << 16);
}

// y -> A: the advantage in front of a run of tokens from the advantage behind it.
struct Affine {
  float a = 1.0f;
  float b = 0.0f;
  __device__ __forceinline__ float operator()(float y) const { return fmaf(a, y, b); }
  // The run `front` followed in time by the run `back`.
  static __device__ __forceinline__ Affine compose(const Affine& front, const Affine& back) {
    Affine both;
    both.a = front.a * back.a;
    both.b = fmaf(front.a, back.b, front.b);
    return both;
  }
};

struct NextValue {
  float value = 0.0f;
  bool exists = false;
};

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

struct Tokens {
  float reward[kItems];
  float value[kItems];
  bool valid[kItems];
};

class RowKernel {
 public:
  __device__ RowKernel(const RewardsAndGaeArgs& args, int64_t row) : args_(args), row_(row) {
    packed_ = args.cu_seqlens != nullptr;
    start_ = packed_ ? args.cu_seqlens[row] : 0;
    length_ = packed_ ? args.cu_seqlens[row + 1] - start_ : args.columns;
    output_ = packed_ ? start_ : row * args.columns;
  }

  __device__ int64_t length() const { return length_; }

  __device__ int64_t offset(int64_t row_stride, int64_t column_stride, int64_t t) const {
    return (packed_ ? 0 : row_ * row_stride) + (start_ + t) * column_stride;
  }
  __device__ float read_at(const View& view, int64_t t) const {
    return read(view, offset(view.row_stride, view.column_stride, t));
  }

  // Positions outside the row count as masked, so they change nothing.
  __device__ void load(int64_t first, Tokens& tokens) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = first + k;
      const bool inside = t >= 0 && t < length_;
      bool valid = inside;
      if (inside && args_.mask.data != nullptr) {
        valid = args_.mask.data[offset(args_.mask.row_stride, args_.mask.column_stride, t)] != 0;
      }
      tokens.valid[k] = valid;
      tokens.value[k] = valid ? read_at(args_.values, t) : 0.0f;
      tokens.reward[k] = inside ? make_reward(t, valid) : 0.0f;
    }
  }

  __device__ float sequence_score() const {
    return read(args_.scores, row_ * args_.scores.row_stride);
  }
  __device__ bool score_at_end() const {
    return args_.rewards.data == nullptr && !args_.scores_per_token;
  }
  __device__ NextValue bootstrap() const {
    NextValue next;
    if (args_.bootstrap.data != nullptr) {
      next.value = read(args_.bootstrap, row_ * args_.bootstrap.row_stride);
    }
    return next;
  }

  __device__ void write(int64_t t, float reward, float value, float advantage, bool valid) const {
    if (t < 0 || t >= length_) return;
    args_.out_advantages[output_ + t] = valid ? advantage : 0.0f;
    args_.out_returns[output_ + t] = valid ? advantage + value : 0.0f;
    if (args_.out_rewards != nullptr) args_.out_rewards[output_ + t] = valid ? reward : 0.0f;
  }

 private:
  __device__ float make_reward(int64_t t, bool valid) const {
    if (args_.rewards.data != nullptr) return valid ? read_at(args_.rewards, t) : 0.0f;
    float kl = 0.0f;
    if (valid && args_.ref_logprobs.data != nullptr) {
      float d = read_at(args_.old_logprobs, t) - read_at(args_.ref_logprobs, t);
      d = d < -args_.log_ratio_clamp ? -args_.log_ratio_clamp : d;  // written so that NaN stays NaN
      d = d > args_.log_ratio_clamp ? args_.log_ratio_clamp : d;
      kl = kl_estimate(d, args_.kl_estimator);
    }
    args_.out_kl[output_ + t] = kl;
    float reward = args_.kl_in_reward ? -args_.kl_coef * kl : 0.0f;
    if (valid && args_.scores_per_token) reward += read_at(args_.scores, t);
    return valid ? reward : 0.0f;
  }

  const RewardsAndGaeArgs& args_;
  int64_t row_, start_, length_, output_;
  bool packed_;
};

struct Shared {
  float warp_value[kMaxWarps];   // first valid V of the warp
  int warp_has_value[kMaxWarps];
  float warp_a[kMaxWarps];       // the affine map of all tokens of the warp
  float warp_b[kMaxWarps];
  float carry_value;
  int carry_exists;
  float carry_advantage;
};

// V of the first valid token after this thread's tokens (step 2).
__device__ NextValue next_after_thread(const Tokens& tokens, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  NextValue own;
#pragma unroll
  for (int k = kItems - 1; k >= 0; --k) {
    if (tokens.valid[k]) own = {tokens.value[k], true};
  }
  const unsigned have = __ballot_sync(kAllLanes, own.exists);
  const unsigned later = lane == kWarp - 1 ? 0u : have & (kAllLanes << (lane + 1));
  const int source = later != 0 ? __ffs(later) - 1 : lane;
  const float later_value = __shfl_sync(kAllLanes, own.value, source);
  const float first_value = __shfl_sync(kAllLanes, own.value, have != 0 ? __ffs(have) - 1 : 0);
  if (lane == 0) {
    shared.warp_value[warp] = first_value;
    shared.warp_has_value[warp] = have != 0;
  }
  __syncthreads();
  if (later != 0) return {later_value, true};
  for (int w = warp + 1; w < warps; ++w) {
    if (shared.warp_has_value[w]) return {shared.warp_value[w], true};
  }
  return {shared.carry_value, shared.carry_exists != 0};
}

// A behind this thread's tokens (step 3).
__device__ float advantage_after_thread(const Affine& own, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Affine suffix = own;  // tokens of lanes lane .. 31
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    Affine behind;
    behind.a = __shfl_down_sync(kAllLanes, suffix.a, distance);
    behind.b = __shfl_down_sync(kAllLanes, suffix.b, distance);
    if (lane + distance < kWarp) suffix = Affine::compose(suffix, behind);
  }
  if (lane == 0) {
    shared.warp_a[warp] = suffix.a;
    shared.warp_b[warp] = suffix.b;
  }
  Affine after;  // tokens of lanes lane + 1 .. 31
  after.a = __shfl_down_sync(kAllLanes, suffix.a, 1);
  after.b = __shfl_down_sync(kAllLanes, suffix.b, 1);
  if (lane == kWarp - 1) after = Affine{};
  __syncthreads();
  float advantage = shared.carry_advantage;
  for (int w = warps - 1; w > warp; --w) {
    advantage = fmaf(shared.warp_a[w], advantage, shared.warp_b[w]);
  }
  return after(advantage);
}

__global__ void __launch_bounds__(kMaxThreads) rewards_and_gae_kernel(
    const __grid_constant__ RewardsAndGaeArgs args) {
  __shared__ Shared shared;
  for (int64_t row_index = blockIdx.x; row_index < args.rows; row_index += gridDim.x) {
    const RowKernel row(args, row_index);
    if (threadIdx.x == 0) {
      const NextValue next = row.bootstrap();
      shared.carry_value = next.value;
      shared.carry_exists = 0;
      shared.carry_advantage = 0.0f;
    }
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(blockDim.x) * kItems;
    const float rate = args.gamma * args.gae_lambda;
    for (int64_t end = row.length(); end > 0; end -= tile) {
      const int64_t first = end - tile + static_cast<int64_t>(threadIdx.x) * kItems;
      Tokens tokens;
      row.load(first, tokens);

      NextValue next = next_after_thread(tokens, shared);
      Affine own, maps[kItems];
#pragma unroll
      for (int k = kItems - 1; k >= 0; --k) {
        if (!tokens.valid[k]) continue;
        if (!next.exists && row.score_at_end()) tokens.reward[k] += row.sequence_score();
        maps[k].a = rate;
        maps[k].b = tokens.reward[k] + args.gamma * next.value - tokens.value[k];
        own = Affine::compose(maps[k], own);
        next = {tokens.value[k], true};
      }
      float advantage = advantage_after_thread(own, shared);
#pragma unroll
      for (int k = kItems - 1; k >= 0; --k) {
        advantage = maps[k](advantage);
        row.write(first + k, tokens.reward[k], tokens.value[k], advantage, tokens.valid[k]);
      }
      // Thread 0 owns the first tokens of the tile: its state is what the tile before needs. Everyone
      // has read the old carry before anyone passes the barrier.
      __syncthreads();
      if (threadIdx.x == 0) {
        shared.carry_advantage = advantage;
        shared.carry_value = next.value;
        shared.carry_exists = next.exists;
      }
      __syncthreads();
    }
  }
}

int block_size(int64_t longest_row) {
  const int64_t threads = (longest_row + kItems - 1) / kItems;
  const int64_t warps = (threads + kWarp - 1) / kWarp;
  return static_cast<int>((warps < 1 ? 1 : (warps > kMaxWarps ? kMaxWarps : warps)) * kWarp);
}

}  // namespace

std::string rewards_and_gae_cuda(const RewardsAndGaeArgs& args, int device, void* stream) {
  if (args.rows == 0 || args.tokens == 0) return "";
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    // Segment lengths live on the device, so packed rows always get the full block.
    const int threads = block_size(args.cu_seqlens != nullptr ? args.tokens : args.columns);
    const int64_t most_blocks = 0x7fffffff;
    const unsigned blocks = static_cast<unsigned>(args.rows < most_blocks ? args.rows : most_blocks);
    rewards_and_gae_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace rlhf_fast
