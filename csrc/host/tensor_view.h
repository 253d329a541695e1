// What a kernel needs to know of a tensor: an address, a dtype and strides. No torch here.
#pragma once

#include <cstdint>

namespace rlhf_fast {

// The values are part of the Python interface (kernels/rlhf_fast_kernels/native.py).
enum class DType : int32_t { f32 = 0, bf16 = 1 };

// A tensor seen as [rows, columns]; strides count elements and may be 0 (expanded) or negative.
// `data == nullptr` means that the optional tensor was not given.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// A bool tensor; one byte per element, anything but 0 is true.
struct MaskView {
  const uint8_t* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

}  // namespace rlhf_fast
