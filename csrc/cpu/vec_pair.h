// Two vectors of elements of a dtype at a time, for ops that go element by element: the same code for
// fp32 and bf16. Which element lies in which lane differs (bf16: even and odd ones) but is the same in
// every tensor of a dtype.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr int64_t kPair = 2 * kLanes;

struct VecPair {
  vfloat a, b;
};

inline VecPair load_pair(const float* address) { return {load(address), load(address + kLanes)}; }

inline VecPair load_pair(const uint16_t* address) {
  VecPair pair;
  load_bf16_pair(address, pair.a, pair.b);
  return pair;
}

inline void store_pair(float* address, VecPair x) {
  store(address, x.a);
  store(address + kLanes, x.b);
}

inline void store_pair(uint16_t* address, VecPair x) {
  const vint bits = pack_bf16_pair(x.a, x.b);
  std::memcpy(address, &bits, sizeof(bits));
}

// The value that a store of x and a load of it would give.
template <class T>
inline vfloat rounded(vfloat x) {
  if (sizeof(T) == 4) return x;
  return from_bits(round_bits_to_bf16(x) & (vint{} + static_cast<int32_t>(0xFFFF0000u)));
}

// The last `count` < kPair elements of a row, padded with zeros.
template <class T>
inline VecPair load_tail(const T* address, int64_t count) {
  T padded[kPair] = {};
  std::memcpy(padded, address, count * sizeof(T));
  return load_pair(padded);
}

template <class T>
inline void store_tail(T* address, int64_t count, VecPair x) {
  T padded[kPair];
  store_pair(padded, x);
  std::memcpy(address, padded, count * sizeof(T));
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
