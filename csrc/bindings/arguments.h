// What the bindings share: how tensors arrive from Python, and where an op runs.
//
// A tensor arrives as a tuple (address, dtype, row stride, column stride), a mask as (address, row
// stride, column stride), an absent optional one as None; rlhf_fast_kernels/native.py builds them.
// Kernels run with the GIL released. Python has validated shapes and dtypes before it calls.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "host/tensor_view.h"

namespace rlhf_fast {

namespace py = pybind11;

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

inline View to_view(py::handle tensor) {
  View view;
  if (tensor.is_none()) return view;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  view.data = pointer<const void>(fields[0]);
  view.dtype = static_cast<DType>(fields[1].cast<int32_t>());
  view.row_stride = fields[2].cast<int64_t>();
  view.column_stride = fields[3].cast<int64_t>();
  return view;
}

inline MaskView to_mask(py::handle tensor) {
  MaskView view;
  if (tensor.is_none()) return view;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  view.data = pointer<const uint8_t>(fields[0]);
  view.row_stride = fields[1].cast<int64_t>();
  view.column_stride = fields[2].cast<int64_t>();
  return view;
}

template <class Args>  // common_type keeps a nullptr from being asked what Args is
using CudaOp = std::string (*)(const std::common_type_t<Args>&, int, void*);

// placement: number of CPU threads, or (CUDA device, stream handle).
template <class Args>
void run_placed(const char* op, Args& args, py::handle placement, void (*on_cpu)(const Args&),
                [[maybe_unused]] CudaOp<Args> on_cuda) {
  if (py::isinstance<py::int_>(placement)) {
    args.threads = placement.cast<int>();
    const py::gil_scoped_release release;
    on_cpu(args);
    return;
  }
  std::string error = "this build has no CUDA code";
#ifdef RLHF_FAST_WITH_CUDA
  const auto [device, stream] = placement.cast<std::pair<int, uintptr_t>>();
  {
    const py::gil_scoped_release release;
    error = on_cuda(args, device, reinterpret_cast<void*>(stream));
  }
#endif
  if (!error.empty()) throw std::runtime_error(std::string(op) + " (cuda): " + error);
}

#ifdef RLHF_FAST_WITH_CUDA
#define RLHF_FAST_CUDA_OP(op) &op##_cuda
#else
#define RLHF_FAST_CUDA_OP(op) nullptr
#endif

}  // namespace rlhf_fast
