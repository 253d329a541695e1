// KL, reward placement, GAE and the moments of the advantages: one block per row, one launch.
//
// A row is walked from its last tile of blockDim.x * kItems tokens to its first; thread i owns kItems
// consecutive ones. Per tile:
//
//   1. every thread loads its tokens and makes their rewards;
//   2. "next valid value": the first valid V of each thread, then of each warp (ballot), so that every
//      token knows V_{t+1} across masked steps; a token with no valid one after it in the row is the
//      last true column and receives the sequence's score;
//   3. the recurrence A_t = a_t*A_{t+1} + b_t with (a, b) = (gamma*lambda, delta_t) on valid tokens and
//      (1, 0) on masked ones is a product of affine maps: composed serially in a thread, by a shuffle
//      scan over the warp, and over the warps through shared memory;
//   4. with the advantage of everything behind it, each thread finishes its tokens and writes them;
//   5. A - shift and its square are summed in fp64. The shift is the first advantage that thread 0
//      came to, so it is one of the row's: nothing cancels, and no second pass is needed.
//
// The order of every sum depends on the block size, which depends on the row length alone (packed rows,
// whose lengths the host does not know, all get the same): results are deterministic and do not change
// with the rows around them. tests/kernels/test_gae_cuda_algorithm.py follows these steps in NumPy, and
// tests/kernels/cuda_emulator runs this file on a CPU; hence cudaLaunchKernel and not <<< >>>.
#include "cuda/rewards_and_gae.h"

#include <cuda_runtime.h>

#include "cuda/device_guard.h"
#include "cuda/gae_row.cuh"

namespace rlhf_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kPackedThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

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

struct Shared {
  float warp_value[kMaxWarps];   // first valid V of the warp
  int warp_has_value[kMaxWarps];
  float warp_a[kMaxWarps];       // the affine map of all tokens of the warp
  float warp_b[kMaxWarps];
  float carry_value;
  int carry_exists;
  float carry_advantage;
  float shift;
  int warp_count[kMaxWarps];     // of the moments
  double warp_sum[kMaxWarps];
  double warp_squares[kMaxWarps];
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

// What a thread knows of the advantages of its tokens (step 5).
struct ShiftedSums {
  int count = 0;
  double sum = 0.0;
  double squares = 0.0;

  __device__ void add(const Tokens& tokens, const float (&advantage)[kItems], double shift) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const double d = tokens.valid[k] ? static_cast<double>(advantage[k]) - shift : 0.0;
      count += tokens.valid[k];
      sum += d;
      squares = fma(d, d, squares);
    }
  }

  // Lanes by a tree, warps in order; thread 0 writes count, mean and m2.
  __device__ void finish(double* out, Shared& shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      count += __shfl_down_sync(kAllLanes, count, distance);
      sum += __shfl_down_sync(kAllLanes, sum, distance);
      squares += __shfl_down_sync(kAllLanes, squares, distance);
    }
    if (lane == 0) {
      shared.warp_count[warp] = count;
      shared.warp_sum[warp] = sum;
      shared.warp_squares[warp] = squares;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < warps; ++w) {
      count += shared.warp_count[w];
      sum += shared.warp_sum[w];
      squares += shared.warp_squares[w];
    }
    const double n = count;
    const double mean = count == 0 ? 0.0 : sum / n;
    const double m2 = squares - sum * mean;
    out[0] = n;
    out[1] = count == 0 ? 0.0 : static_cast<double>(shared.shift) + mean;
    out[2] = m2 < 0.0 ? 0.0 : m2;  // written so that NaN stays NaN
  }
};

template <bool kVector>
__device__ void run_tile(const RewardsAndGaeArgs& args, const GaeRow<kVector>& row,
                         int64_t first, ShiftedSums& sums, Shared& shared) {
  Tokens tokens;
  row.load(first, tokens);
  NextValue next = next_after_thread(tokens, shared);
  Affine own, maps[kItems];
#pragma unroll
  for (int k = kItems - 1; k >= 0; --k) {
    if (!tokens.valid[k]) continue;
    if (!next.exists && row.score_at_end()) tokens.reward[k] += row.sequence_score();
    maps[k].a = args.gamma * args.gae_lambda;
    maps[k].b = tokens.reward[k] + args.gamma * next.value - tokens.value[k];
    own = Affine::compose(maps[k], own);
    next = {tokens.value[k], true};
  }
  float behind = advantage_after_thread(own, shared);
  float advantage[kItems];
#pragma unroll
  for (int k = kItems - 1; k >= 0; --k) advantage[k] = behind = maps[k](behind);
  row.write(first, tokens, advantage);
  // Thread 0 owns the first tokens of the tile: its state is what the tile before needs. Everyone has
  // read the old carry before anyone passes the barrier.
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!shared.carry_exists) shared.shift = behind;
    shared.carry_advantage = behind;
    shared.carry_value = next.value;
    shared.carry_exists = next.exists;
  }
  __syncthreads();
  if (args.out_moments != nullptr) sums.add(tokens, advantage, shared.shift);
}

template <bool kVector>
__global__ void __launch_bounds__(kMaxThreads) rewards_and_gae_kernel(
    const __grid_constant__ RewardsAndGaeArgs args) {
  __shared__ Shared shared;
  const GaeRow<kVector> row(args, blockIdx.x);
  if (threadIdx.x == 0) {
    shared.carry_value = row.bootstrap();
    shared.carry_exists = 0;
    shared.carry_advantage = 0.0f;
    shared.shift = 0.0f;
  }
  __syncthreads();
  ShiftedSums sums;
  const int64_t tile = static_cast<int64_t>(blockDim.x) * kItems;
  for (int64_t tiles = (row.length() + tile - 1) / tile; tiles > 0; --tiles) {
    run_tile(args, row, (tiles - 1) * tile + threadIdx.x * kItems, sums, shared);
  }
  if (args.out_moments != nullptr) {
    sums.finish(args.out_moments + 3 * static_cast<int64_t>(blockIdx.x), shared);
  }
}

int block_size(const RewardsAndGaeArgs& args) {
  if (args.cu_seqlens != nullptr) return kPackedThreads;
  const int64_t threads = (args.columns + kItems - 1) / kItems;
  const int64_t warps = (threads + kWarp - 1) / kWarp;
  return static_cast<int>((warps > kMaxWarps ? kMaxWarps : warps) * kWarp);
}

bool vectorizable(const void* data, int64_t bytes, int64_t row_stride, int64_t column_stride) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % (kItems * bytes) == 0 &&
                             row_stride % kItems == 0 && column_stride == 1);
}

bool vectorizable(const View& view) {
  const int64_t bytes = view.dtype == DType::f32 ? 4 : 2;
  return vectorizable(view.data, bytes, view.row_stride, view.column_stride);
}

bool vectorizable(const RewardsAndGaeArgs& args) {
  if (args.cu_seqlens != nullptr || args.columns % kItems != 0) return false;
  for (const float* out : {args.out_rewards, args.out_kl, args.out_advantages, args.out_returns}) {
    if (!vectorizable(out, sizeof(float), args.columns, 1)) return false;
  }
  const MaskView& mask = args.mask;
  return vectorizable(mask.data, 1, mask.row_stride, mask.column_stride) &&
         vectorizable(args.rewards) && vectorizable(args.old_logprobs) &&
         vectorizable(args.ref_logprobs) && vectorizable(args.kl) && vectorizable(args.values) &&
         (!args.scores_per_token || vectorizable(args.scores));
}

}  // namespace

std::string rewards_and_gae_cuda(const RewardsAndGaeArgs& args, int device, void* stream) {
  if (args.rows == 0 || args.tokens == 0) return "";
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    const unsigned blocks = static_cast<unsigned>(args.rows);
    void* parameters[] = {const_cast<RewardsAndGaeArgs*>(&args)};
    error = cudaLaunchKernel(
        vectorizable(args) ? rewards_and_gae_kernel<true> : rewards_and_gae_kernel<false>,
        dim3(blocks), dim3(block_size(args)), parameters, 0, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace rlhf_fast
