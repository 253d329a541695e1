// The PPO objective with its metrics and gradients, in two launches.
//
// 1. One block per tile of kTile tokens; a thread owns kItems consecutive ones and loads all their inputs
//    before it computes, so that a single wave of blocks keeps the memory busy. The formulas are those of
//    the CPU (cpu/ppo_loss_terms.h). Sums: fp32 over the tokens of a warp, fp64 over the warps, and one row
//    of kSlots numbers a tile in the workspace.
// 2. One block adds the rows in fp64, always in the same order, and writes loss, sums and extrema.
//
// The tile is fixed, so a result depends on nothing but the inputs. A counter by which the last block of
// the first launch did the work of the second would save a launch and need memory that is zero before
// every call, on every stream and in every replay of a graph: not worth it.
//
// tests/kernels/cuda_emulator runs this file on a CPU; hence cudaLaunchKernel and not <<< >>>.
#include "cuda/ppo_loss.h"

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/device_guard.h"

namespace rlhf_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kItems = 4;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kThreads * kItems;
constexpr int kFinishWarps = 16;
constexpr int kSlots = kPpoSums + 2;  // and the largest ratio and negative ratio
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- what cpu/ppo_loss_terms.h asks for ---------------------------------------------------------

#define RLHF_FAST_TERM __device__ __forceinline__
typedef float Real;
typedef bool Truth;

RLHF_FAST_TERM float splat(float x) { return x; }
RLHF_FAST_TERM float choose(bool which, float yes, float no) { return which ? yes : no; }
RLHF_FAST_TERM float vmax(float a, float b) { return a > b ? a : b; }
RLHF_FAST_TERM float vmin(float a, float b) { return a < b ? a : b; }

struct Exponential {
  float exp, exp_minus_1, exp_minus_1_minus_x;
};

// The polynomial of cpu/vec_math.h, for |x| <= 85.
RLHF_FAST_TERM Exponential exponential(float x) {
  const float n = rintf(x * 1.44269504f);
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = fmaf(0.0013814467f, r, 0.008368781f);
  p = fmaf(p, r, 0.041668393f);
  p = fmaf(p, r, 0.1666652f);
  p = fmaf(p, r, 0.49999994f);
  const float beyond = p * r * r;
  const float power = __uint_as_float(static_cast<unsigned>(static_cast<int>(n) + 127) << 23);
  Exponential result;
  result.exp = (beyond + r + 1.0f) * power;
  result.exp_minus_1 = n == 0.0f ? beyond + r : result.exp - 1.0f;
  result.exp_minus_1_minus_x = n == 0.0f ? beyond : result.exp - 1.0f - x;
  return result;
}

#include "cpu/ppo_loss_terms.h"

struct ThreadSums {
  float values[kWarp] = {};  // kPpoSums of them
  float highest = -HUGE_VALF;
  float highest_negative = -HUGE_VALF;

  RLHF_FAST_TERM void add(PpoSum name, float x) { values[name] += x; }
  RLHF_FAST_TERM void add_square(PpoSum name, float x) { values[name] = fmaf(x, x, values[name]); }
  RLHF_FAST_TERM void count(PpoSum name, bool which) { values[name] += which ? 1.0f : 0.0f; }
  RLHF_FAST_TERM void ratio(float x, bool valid) {
    const float kept = valid ? x : 0.0f;
    add(kRatio, kept);
    add_square(kRatioSquared, kept);
    highest = vmax(valid ? x : -HUGE_VALF, highest);
    highest_negative = vmax(valid ? -x : -HUGE_VALF, highest_negative);
    count(kTokens, valid);
  }
};

// ---- reading and writing ------------------------------------------------------------------------

// kItems elements of a tensor as they lie in memory: in flight until `at` looks at them.
struct Raw {
  uint4 bits;
  bool half;

  RLHF_FAST_TERM float at(int k) const {
    if (!half) {
      return __uint_as_float(k == 0 ? bits.x : k == 1 ? bits.y : k == 2 ? bits.z : bits.w);
    }
    const unsigned word = k < 2 ? bits.x : bits.y;
    return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
};

RLHF_FAST_TERM Raw load_raw(const TokenTensor& tensor, int64_t first, int64_t items, bool aligned) {
  Raw raw;
  raw.bits = make_uint4(0, 0, 0, 0);
  raw.half = tensor.dtype == DType::bf16;
  if (tensor.data == nullptr) return raw;
  if (!raw.half) {
    const unsigned* source = static_cast<const unsigned*>(tensor.data) + first;
    if (aligned) {
      raw.bits = __ldg(reinterpret_cast<const uint4*>(source));
    } else {
      if (items > 0) raw.bits.x = __ldg(source);
      if (items > 1) raw.bits.y = __ldg(source + 1);
      if (items > 2) raw.bits.z = __ldg(source + 2);
      if (items > 3) raw.bits.w = __ldg(source + 3);
    }
    return raw;
  }
  const unsigned short* source = static_cast<const unsigned short*>(tensor.data) + first;
  if (aligned) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(source));
    raw.bits.x = words.x;
    raw.bits.y = words.y;
  } else {
    if (items > 0) raw.bits.x = __ldg(source);
    if (items > 1) raw.bits.x |= static_cast<unsigned>(__ldg(source + 1)) << 16;
    if (items > 2) raw.bits.y = __ldg(source + 2);
    if (items > 3) raw.bits.y |= static_cast<unsigned>(__ldg(source + 3)) << 16;
  }
  return raw;
}

// Bit k: whether token first + k counts.
RLHF_FAST_TERM unsigned load_mask(const uint8_t* mask, int64_t first, int64_t items, bool aligned) {
  unsigned bits = 0;
  if (aligned) {
    const unsigned word = __ldg(reinterpret_cast<const unsigned*>(mask + first));
    for (int k = 0; k < kItems; ++k) bits |= ((word >> (8 * k) & 0xffu) != 0 ? 1u : 0u) << k;
  } else {
    for (int k = 0; k < kItems; ++k) {
      if (k < items && __ldg(mask + first + k) != 0) bits |= 1u << k;
    }
  }
  return bits;
}

RLHF_FAST_TERM void store(float* out, int64_t first, int64_t items, bool aligned,
                          const float (&x)[kItems]) {
  if (out == nullptr) return;
  if (aligned) {
    *reinterpret_cast<float4*>(out + first) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k < items) out[first + k] = x[k];
    }
  }
}

RLHF_FAST_TERM double read_number(const DeviceNumber& number) {
  switch (number.type) {
    case DeviceNumber::Type::f32: return *static_cast<const float*>(number.data);
    case DeviceNumber::Type::f64: return *static_cast<const double*>(number.data);
    default: return static_cast<double>(*static_cast<const int64_t*>(number.data));
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// Adds 2 * kWidth values over as many lanes; lane i ends up with the sum of values[i], in values[0]. Each
// step halves the number of values a lane cares for: 31 shuffles for 32 values, where one value after the
// other would take 160. (A template, because an array that is indexed in a loop may end up in memory.)
template <int kWidth>
RLHF_FAST_TERM void transpose_and_add(float (&values)[kWarp]) {
  const bool upper = (threadIdx.x & kWidth) != 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float kept = upper ? values[i + kWidth] : values[i];
    const float sent = upper ? values[i] : values[i + kWidth];
    values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kWidth);
  }
  if constexpr (kWidth > 1) transpose_and_add<kWidth / 2>(values);
}

RLHF_FAST_TERM float max_over_warp(float x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    x = vmax(__shfl_xor_sync(kAllLanes, x, width), x);
  }
  return x;
}

// Two rows' slot `slot`: a sum, or for the extrema a maximum.
RLHF_FAST_TERM double combine(double a, double b, int slot) {
  if (slot < kPpoSums) return a + b;
  return b > a ? b : a;
}

RLHF_FAST_TERM double identity(int slot) { return slot < kPpoSums ? 0.0 : -HUGE_VAL; }

// ---- the kernels --------------------------------------------------------------------------------

struct TileArgs {
  PpoLossArgs ppo;
  Constants constants;      // slopes for a normalizer of 1 if the normalizer is on the device
  DeviceNumber normalizer;
  double* workspace;        // [tiles, kSlots]
  bool aligned;
};

RLHF_FAST_TERM Constants constants_of(const TileArgs& args) {
  Constants c = args.constants;
  if (args.normalizer.data != nullptr) {
    const float count = static_cast<float>(read_number(args.normalizer));
    const float inverse = count > 0.0f ? 1.0f / count : 0.0f;
    c.policy_slope *= inverse;
    c.kl_slope *= inverse;
    c.entropy_slope *= inverse;
    c.value_slope *= inverse;
  }
  return c;
}

RLHF_FAST_TERM void run_thread(const TileArgs& args, int64_t first, ThreadSums& sums) {
  const PpoLossArgs& ppo = args.ppo;
  const int64_t left = ppo.tokens - first;
  const int64_t items = left < kItems ? left : kItems;
  const bool aligned = args.aligned && items == kItems;
  const bool clipping = ppo.old_values.data != nullptr;
  const unsigned mask = load_mask(ppo.mask, first, items, aligned);
  const Raw logprobs = load_raw(ppo.logprobs, first, items, aligned);
  const Raw old_logprobs = load_raw(ppo.old_logprobs, first, items, aligned);
  const Raw advantages = load_raw(ppo.advantages, first, items, aligned);
  const Raw entropy = load_raw(ppo.entropy, first, items, aligned);
  const Raw ref_logprobs = load_raw(ppo.ref_logprobs, first, items, aligned);
  const Raw weights = load_raw(ppo.weights, first, items, aligned);
  const Raw values = load_raw(ppo.values, first, items, aligned);
  const Raw old_values = load_raw(ppo.old_values, first, items, aligned);
  const Raw returns = load_raw(ppo.returns, first, items, aligned);
  const Raw kl = load_raw(ppo.kl, first, items, aligned);
  const Constants c = constants_of(args);
  float d_logprobs[kItems], d_entropy[kItems], d_values[kItems], d_kl[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const bool valid = (mask >> k & 1u) != 0;
    const auto read = [valid, k](const Raw& raw) { return valid ? raw.at(k) : 0.0f; };
    if (ppo.logprobs.data != nullptr) {
      const float logprob = read(logprobs);
      d_logprobs[k] = policy_term(c, logprob - read(old_logprobs), read(advantages),
                                  ppo.weights.data != nullptr ? read(weights) : 1.0f, valid, sums);
      if (ppo.ref_logprobs.data != nullptr) {
        d_logprobs[k] += kl_term(c, logprob - read(ref_logprobs), valid, sums);
      }
    }
    if (ppo.entropy.data != nullptr) {
      d_entropy[k] = given_term(kEntropy, c.entropy_slope, read(entropy), valid, sums);
    }
    if (ppo.kl.data != nullptr) d_kl[k] = given_term(kKl, c.kl_slope, read(kl), valid, sums);
    if (ppo.values.data != nullptr) {
      d_values[k] = value_term(c, read(values), read(old_values), read(returns), clipping, sums);
      sums.count(kValueTokens, valid);
    }
  }
  store(ppo.d_logprobs, first, items, aligned, d_logprobs);
  store(ppo.d_entropy, first, items, aligned, d_entropy);
  store(ppo.d_values, first, items, aligned, d_values);
  store(ppo.d_kl, first, items, aligned, d_kl);
}

__global__ void __launch_bounds__(kThreads) tile_kernel(const __grid_constant__ TileArgs args) {
  __shared__ double shared[kWarps][kSlots];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, thread = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + thread * kItems;
  ThreadSums sums;
  run_thread(args, first, sums);  // behind the last token everything is masked
  const float highest = max_over_warp(sums.highest);
  const float highest_negative = max_over_warp(sums.highest_negative);
  transpose_and_add<kWarp / 2>(sums.values);
  if (lane < kSlots) {
    shared[warp][lane] = lane < kPpoSums ? sums.values[0] : lane == kPpoSums ? highest : highest_negative;
  }
  __syncthreads();
  if (thread < kSlots) {
    double total = identity(thread);
    for (int w = 0; w < kWarps; ++w) total = combine(total, shared[w][thread], thread);
    args.workspace[static_cast<int64_t>(blockIdx.x) * kSlots + thread] = total;
  }
}

struct FinishArgs {
  PpoLossArgs ppo;
  DeviceNumber normalizer;
  const double* workspace;
  int64_t tiles;
};

__global__ void __launch_bounds__(kFinishWarps * kWarp)
    finish_kernel(const __grid_constant__ FinishArgs args) {
  __shared__ double shared[kFinishWarps][kSlots];
  __shared__ double metrics[kPpoSums];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, thread = threadIdx.x;
  if (lane < kSlots) {
    double total = identity(lane);
#pragma unroll 8
    for (int64_t tile = warp; tile < args.tiles; tile += kFinishWarps) {
      total = combine(total, args.workspace[tile * kSlots + lane], lane);
    }
    shared[warp][lane] = total;
  }
  __syncthreads();
  if (thread < kSlots) {
    double total = identity(thread);
    for (int w = 0; w < kFinishWarps; ++w) total = combine(total, shared[w][thread], thread);
    if (thread < kPpoSums) {
      metrics[thread] = 0.0 + sum_scale(thread) * total;  // no -0
      args.ppo.sums[thread] = static_cast<float>(metrics[thread]);
    } else {
      args.ppo.extrema[thread - kPpoSums] = static_cast<float>(total);
    }
  }
  __syncthreads();
  if (thread == 0) {
    const double normalizer =
        args.normalizer.data != nullptr ? read_number(args.normalizer) : args.ppo.normalizer;
    *args.ppo.loss = static_cast<float>(objective(metrics, args.ppo.value_coef, args.ppo.kl_coef,
                                                  args.ppo.entropy_coef, normalizer));
  }
}

RLHF_FAST_TERM unsigned to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ PpoScaleArgs args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kItems;
  const int64_t left = args.tokens - first;
  const float upstream = __ldg(args.upstream);
#pragma unroll
  for (int g = 0; g < PpoScaleArgs::kGradients; ++g) {
    if (args.from[g] == nullptr || left <= 0) continue;
    const TokenTensor from{args.from[g], DType::f32};
    const Raw raw = load_raw(from, first, left, left >= kItems);
    float x[kItems];
    // A gradient of a masked slot is 0 and stays it, even for an upstream that is not finite.
    for (int k = 0; k < kItems; ++k) x[k] = raw.at(k) == 0.0f ? 0.0f : raw.at(k) * upstream;
    void* to = const_cast<void*>(args.to[g].data);
    if (args.to[g].dtype == DType::f32) {
      store(static_cast<float*>(to), first, left, left >= kItems, x);
      continue;
    }
    unsigned short* out = static_cast<unsigned short*>(to) + first;
    if (left >= kItems) {
      *reinterpret_cast<uint2*>(out) = make_uint2(to_bf16(x[0]) | to_bf16(x[1]) << 16,
                                                  to_bf16(x[2]) | to_bf16(x[3]) << 16);
    } else {
      for (int k = 0; k < kItems; ++k) {
        if (k < left) out[k] = static_cast<unsigned short>(to_bf16(x[k]));
      }
    }
  }
}

// ---- launching ----------------------------------------------------------------------------------

bool is_aligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether four tokens of every tensor can be read and written at once.
bool all_aligned(const PpoLossArgs& args) {
  const TokenTensor inputs[] = {args.logprobs, args.old_logprobs, args.advantages, args.entropy,
                                args.ref_logprobs, args.weights, args.values, args.old_values,
                                args.returns, args.kl};
  bool aligned = is_aligned(args.mask, kItems);
  for (const TokenTensor& tensor : inputs) {
    aligned = aligned && is_aligned(tensor.data, tensor.dtype == DType::f32 ? 16 : 8);
  }
  for (const float* out : {args.d_logprobs, args.d_entropy, args.d_values, args.d_kl}) {
    aligned = aligned && is_aligned(out, 16);
  }
  return aligned;
}

int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

template <class Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, const Args& args,
                   void* stream) {
  void* parameters[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), parameters, 0,
                          static_cast<cudaStream_t>(stream));
}

std::string describe(cudaError_t error) {
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace

int64_t ppo_loss_workspace(int64_t tokens) { return tiles_of(tokens) * kSlots; }

std::string ppo_loss_cuda(const PpoLossArgs& args, const DeviceNumber& normalizer,
                          double* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return describe(guard.error());
  double inverse = args.normalizer > 0.0 ? 1.0 / args.normalizer : 0.0;
  if (normalizer.data != nullptr) inverse = 1.0;
  const int64_t tiles = tiles_of(args.tokens);
  cudaError_t error = cudaSuccess;
  if (tiles > 0) {
    const TileArgs tile{args, make_constants(args, inverse), normalizer, workspace,
                        all_aligned(args)};
    error = launch(tile_kernel, tiles, kThreads, tile, stream);
  }
  if (error == cudaSuccess) {
    const FinishArgs finish{args, normalizer, workspace, tiles};
    error = launch(finish_kernel, 1, kFinishWarps * kWarp, finish, stream);
  }
  return describe(error);
}

std::string ppo_loss_scale_cuda(const PpoScaleArgs& args, int device, void* stream) {
  if (args.tokens == 0) return "";
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return describe(guard.error());
  return describe(launch(scale_kernel, tiles_of(args.tokens), kThreads, args, stream));
}

}  // namespace rlhf_fast
