// The element-wise parts of a decoder layer for training. Tensors are fp32, as addresses.
#include "bindings/families.h"

#include "bindings/arguments.h"
#include "cpu/layer_gradients.h"

namespace rlhf_fast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void run_swiglu(int64_t count, uintptr_t gate, uintptr_t up, uintptr_t out, uintptr_t grad_out,
                uintptr_t grad_gate, uintptr_t grad_up, int threads) {
  const SwigluArgs args = {count,
                           at<const float>(gate),
                           at<const float>(up),
                           at<float>(out),
                           at<const float>(grad_out),
                           at<float>(grad_gate),
                           at<float>(grad_up),
                           threads};
  const py::gil_scoped_release release;
  swiglu(args);
}

// shape: (tokens, heads, half); strides: of a token and a head of x and of out.
void run_rotary(const py::tuple& shape, uintptr_t x, const py::tuple& strides, uintptr_t cos,
                uintptr_t sin, uintptr_t out, const py::tuple& out_strides, bool transposed,
                int threads) {
  RotaryArgs args;
  args.tokens = shape[0].cast<int64_t>();
  args.heads = shape[1].cast<int64_t>();
  args.half = shape[2].cast<int64_t>();
  args.x = at<const float>(x);
  args.token_stride = strides[0].cast<int64_t>();
  args.head_stride = strides[1].cast<int64_t>();
  args.cos = at<const float>(cos);
  args.sin = at<const float>(sin);
  args.out = at<float>(out);
  args.out_token_stride = out_strides[0].cast<int64_t>();
  args.out_head_stride = out_strides[1].cast<int64_t>();
  args.transposed = transposed;
  args.threads = threads;
  const py::gil_scoped_release release;
  rotary(args);
}

void run_rms_norm_backward(int64_t rows, int64_t columns, uintptr_t x, uintptr_t weight,
                           uintptr_t grad_y, float eps, uintptr_t residual, uintptr_t grad_x,
                           uintptr_t grad_weight, int threads) {
  const RmsNormBackwardArgs args = {rows,
                                    columns,
                                    at<const float>(x),
                                    at<const float>(weight),
                                    at<const float>(grad_y),
                                    eps,
                                    at<const float>(residual),
                                    at<float>(grad_x),
                                    at<float>(grad_weight),
                                    threads};
  const py::gil_scoped_release release;
  rms_norm_backward(args);
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("swiglu", &run_swiglu);
  m.def("rotary", &run_rotary);
  m.def("rms_norm_backward", &run_rms_norm_backward);
}

}  // namespace rlhf_fast
