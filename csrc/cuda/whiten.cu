// Moments of chunks of kMomentsChunk elements, a block each, with two passes over registers (mean, then
// squared deviations); then every block of the second launch merges the moments it was given, those of
// the chunks or of other sets, and normalises its own chunk. Above kMergeInline sets one block merges
// them in a launch between the two. All sums are fp64 in an order that depends on the sizes alone.
// tests/kernels/test_whiten_cuda_algorithm.py follows the order in NumPy, and tests/kernels/cuda_emulator
// runs this file on a CPU; hence cudaLaunchKernel and not <<< >>>.
#include "cuda/whiten.h"

#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "cuda/device_guard.h"

namespace rlhf_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kItems = kMomentsChunk / kThreads;
constexpr int64_t kMergeInline = 512;  // two sets a thread
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kItems * kThreads == kMomentsChunk, "a block covers a chunk");

struct Moments {
  double count, mean, m2;
};

// The same sum in every thread: lanes by a tree, warps in order.
__device__ double block_sum(double x, double* scratch) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  __syncthreads();  // nobody reads what the scratch held before
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) total += scratch[warp];
  return total;
}

// The moments of the union of disjoint sets, in every thread.
__device__ Moments merge_sets(const double* stats, int64_t sets, double* scratch) {
  if (sets == 1) return {stats[0], stats[1], stats[2]};
  double count = 0.0, sum = 0.0, m2 = 0.0;
  for (int64_t i = threadIdx.x; i < sets; i += kThreads) {
    count += stats[3 * i];
    sum += stats[3 * i] * stats[3 * i + 1];
  }
  Moments total;
  total.count = block_sum(count, scratch);
  sum = block_sum(sum, scratch);
  total.mean = total.count > 0.0 ? sum / total.count : 0.0;
  for (int64_t i = threadIdx.x; i < sets; i += kThreads) {
    const double difference = stats[3 * i + 1] - total.mean;
    m2 += stats[3 * i + 2] + stats[3 * i] * difference * difference;
  }
  total.m2 = block_sum(m2, scratch);
  return total;
}

// Where the elements of a chunk lie. Dense tensors are read by the number of the element.
struct Layout {
  View x;
  MaskView mask;
  int64_t elements;
  int64_t columns;
  bool dense;

  __device__ bool load(int64_t element, float& value) const {
    value = 0.0f;
    if (element >= elements) return false;
    int64_t row = 0, column = element;
    if (!dense) {
      row = element / columns;
      column = element - row * columns;
    }
    if (mask.data != nullptr &&
        mask.data[row * mask.row_stride + column * mask.column_stride] == 0) {
      return false;
    }
    const int64_t at = row * x.row_stride + column * x.column_stride;
    if (x.dtype == DType::f32) {
      value = __ldg(static_cast<const float*>(x.data) + at);
    } else {
      const unsigned bits = __ldg(static_cast<const unsigned short*>(x.data) + at);
      value = __uint_as_float(bits << 16);
    }
    return true;
  }
};

__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ Layout layout,
                                                           double* partials) {
  __shared__ double scratch[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentsChunk + threadIdx.x;
  float value[kItems];
  bool valid[kItems];
  double count = 0.0, sum = 0.0, m2 = 0.0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    valid[i] = layout.load(first + i * kThreads, value[i]);
    count += valid[i] ? 1.0 : 0.0;
    sum += value[i];
  }
  count = block_sum(count, scratch);
  sum = block_sum(sum, scratch);
  const double mean = count > 0.0 ? sum / count : 0.0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const double deviation = valid[i] ? value[i] - mean : 0.0;
    m2 = fma(deviation, deviation, m2);
  }
  m2 = block_sum(m2, scratch);
  if (threadIdx.x == 0) {
    double* out = partials + 3 * static_cast<int64_t>(blockIdx.x);
    out[0] = count;
    out[1] = mean;
    out[2] = m2;
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const double* stats, int64_t sets,
                                                         double* out) {
  __shared__ double scratch[kWarps];
  const Moments total = merge_sets(stats, sets, scratch);
  if (threadIdx.x == 0) {
    out[0] = total.count;
    out[1] = total.mean;
    out[2] = total.m2;
  }
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(
    const __grid_constant__ Layout layout, const double* stats, int64_t sets, bool shift_mean,
    bool unbiased, double eps, float* out) {
  __shared__ double scratch[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentsChunk + threadIdx.x;
  float value[kItems];
  bool valid[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) valid[i] = layout.load(first + i * kThreads, value[i]);
  const Moments total = merge_sets(stats, sets, scratch);
  double scale = 1.0;  // without spread, with at most one element
  if (total.count > 1.0) {
    scale = 1.0 / sqrt(total.m2 / (total.count - (unbiased ? 1.0 : 0.0)) + eps);
  }
  const double offset = shift_mean ? 0.0 : total.mean;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t element = first + i * kThreads;
    const double y = fma(value[i] - total.mean, scale, offset);
    if (element < layout.elements) out[element] = valid[i] ? static_cast<float>(y) : 0.0f;
  }
}

bool dense(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return column_stride == 1 && (rows == 1 || row_stride == columns);
}

template <class Args>
Layout make_layout(const Args& args) {
  Layout layout;
  layout.x = args.x;
  layout.mask = args.mask;
  layout.elements = args.rows * args.columns;
  layout.columns = args.columns;
  layout.dense =
      dense(args.rows, args.columns, args.x.row_stride, args.x.column_stride) &&
      (args.mask.data == nullptr ||
       dense(args.rows, args.columns, args.mask.row_stride, args.mask.column_stride));
  return layout;
}

unsigned chunks_of(int64_t elements) {
  return static_cast<unsigned>((elements + kMomentsChunk - 1) / kMomentsChunk);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, void* stream,
                   std::remove_const_t<Parameters>... arguments) {
  void* addresses[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0,
                          static_cast<cudaStream_t>(stream));
}

std::string describe(cudaError_t error) {
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string masked_moments_cuda(const MaskedMomentsArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return describe(guard.error());
  const Layout layout = make_layout(args);
  const unsigned chunks = chunks_of(layout.elements);
  cudaError_t error = cudaSuccess;
  if (chunks != 0) error = launch(moments_kernel, chunks, stream, layout, args.partials);
  if (error == cudaSuccess && args.out != nullptr) {
    error = launch(merge_kernel, 1, stream, args.partials, chunks, args.out);
  }
  return describe(error);
}

std::string whiten_cuda(const WhitenArgs& args, int device, void* stream) {
  const Layout layout = make_layout(args);
  if (layout.elements == 0) return "";
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return describe(guard.error());
  cudaError_t error = cudaSuccess;
  const double* stats = args.stats;
  int64_t sets = args.sets;
  if (sets > kMergeInline) {
    error = launch(merge_kernel, 1, stream, stats, sets, args.merged);
    stats = args.merged;
    sets = 1;
  }
  if (error == cudaSuccess) {
    error = launch(whiten_kernel, chunks_of(layout.elements), stream, layout, stats, sets,
                   args.shift_mean, args.unbiased, args.eps, args.out);
  }
  return describe(error);
}

}  // namespace rlhf_fast
