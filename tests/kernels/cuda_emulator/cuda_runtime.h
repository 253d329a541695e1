// Enough of the CUDA runtime to run csrc/cuda/*.cu on a CPU, compiled as C++ by the tests.
//
// Blocks run one after the other. The threads of a block are fibers on one thread of the host; a fiber runs
// until __syncthreads() or a shuffle and goes on when its block or its warp has arrived there too. A barrier
// that not all threads reach ends the process with a message, instead of hanging as on a device. Launches
// must go through cudaLaunchKernel, whose arguments are copied as on a device. What this cannot show: races
// between warps, speed, and the arithmetic of a device (FMA contraction).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned load\n");  // a device would stop as well
    std::abort();
  }
  return *address;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
using std::fmaf;
using std::rintf;

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "error"; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;
enum class State { ready, at_block_barrier, at_shuffle, finished };

struct Fiber {
  ucontext_t context;
  State state = State::ready;
  unsigned shuffles = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> exchange[2];  // of even and of odd shuffles
  ucontext_t scheduler;
  unsigned current = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
inline Block block;

inline void wait(State state) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
  threadIdx = dim3(block.current);
}

inline void enter() {
  block.body(block.argument);
  block.fibers[block.current].state = State::finished;
}

// Fibers first .. last go on if all of them wait in `state`.
inline bool release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (block.fibers[i].state != state) return false;
  }
  for (size_t i = first; i < last; ++i) block.fibers[i].state = State::ready;
  return true;
}

inline void run_block(unsigned threads) {
  block.fibers = std::vector<Fiber>(threads);
  for (auto& values : block.exchange) values.assign(threads, 0);
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool ran = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.fibers[i].state != State::ready) continue;
      ran = true;
      block.current = i;
      threadIdx = dim3(i);
      swapcontext(&block.scheduler, &block.fibers[i].context);
    }
    if (ran) continue;
    bool moved = release(0, threads, State::at_block_barrier);
    for (unsigned w = 0; w < threads; w += kWarp) {
      moved = release(w, w + kWarp, State::at_shuffle) || moved;
    }
    if (moved) continue;
    for (const Fiber& fiber : block.fibers) {
      if (fiber.state != State::finished) {
        std::fprintf(stderr, "not all threads reached a barrier or a shuffle\n");
        std::abort();
      }
    }
    return;
  }
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }

namespace emulator {

// Gives x to the other lanes of the warp; returns what they gave, from lane 0 on.
template <class T>
const uint64_t* share(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one word a lane");
  const unsigned self = block.current;
  auto& values = block.exchange[block.fibers[self].shuffles++ % 2];
  values[self] = 0;
  std::memcpy(&values[self], &x, sizeof(T));
  wait(State::at_shuffle);
  return &values[self / kWarp * kWarp];
}

template <class T>
T shuffle(T x, unsigned lane) {
  const uint64_t* lanes = share(x);
  std::memcpy(&x, lanes + lane, sizeof(T));
  return x;
}

inline unsigned lane() { return block.current % kWarp; }

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::shuffle(x, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  return emulator::shuffle(x, emulator::lane() ^ static_cast<unsigned>(lane_mask));
}
template <class T>
T __shfl_down_sync(unsigned, T x, int distance) {
  const unsigned from = emulator::lane() + static_cast<unsigned>(distance);
  return emulator::shuffle(x, from < emulator::kWarp ? from : emulator::lane());
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* lanes = emulator::share(predicate);
  unsigned result = 0;
  for (unsigned i = 0; i < emulator::kWarp; ++i) result |= lanes[i] != 0 ? 1u << i : 0u;
  return result;
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 threads, void** arguments,
                             size_t, cudaStream_t) {
  struct Call {
    void (*kernel)(P...);
    void** arguments;
  } call{kernel, arguments};
  emulator::block.argument = &call;
  emulator::block.body = [](void* opaque) {
    const Call* self = static_cast<Call*>(opaque);
    emulator::call(self->kernel, self->arguments, std::index_sequence_for<P...>());
  };
  gridDim = grid;
  blockDim = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    emulator::run_block(threads.x);
  }
  return cudaSuccess;
}
