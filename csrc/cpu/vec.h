// Portable vectors for csrc/cpu: the compiler's vector extension at the width of the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "host/tensor_view.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));

inline vfloat load(const float* address) {
  vfloat value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

inline void store(float* address, vfloat value) { std::memcpy(address, &value, sizeof(value)); }

inline vfloat splat(float value) { return vfloat{} + value; }

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// `count` elements of one row as fp32: the tensor's own memory when it is that already, otherwise a
// copy in `scratch`.
inline const float* read_row(const View& view, int64_t offset, int64_t count, float* scratch) {
  const int64_t stride = view.column_stride;
  if (view.dtype == DType::f32) {
    const float* source = static_cast<const float*>(view.data) + offset;
    if (stride == 1) return source;
    for (int64_t i = 0; i < count; ++i) scratch[i] = source[i * stride];
    return scratch;
  }
  const uint16_t* source = static_cast<const uint16_t*>(view.data) + offset;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(source[i * stride]);
  }
  return scratch;
}

inline float read_one(const View& view, int64_t offset) {
  if (view.dtype == DType::f32) return static_cast<const float*>(view.data)[offset];
  return bf16_to_float(static_cast<const uint16_t*>(view.data)[offset]);
}

inline const uint8_t* read_mask(const MaskView& view, int64_t offset, int64_t count,
                                uint8_t* scratch) {
  const uint8_t* source = view.data + offset;
  if (view.column_stride == 1) return source;
  for (int64_t i = 0; i < count; ++i) scratch[i] = source[i * view.column_stride];
  return scratch;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
