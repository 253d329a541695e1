// A decoder layer for training, its products and its element-wise parts. Tensors are fp32, as addresses.
#include "bindings/families.h"

#include "bindings/arguments.h"
#include "cpu/decoder_layer.h"
#include "cpu/layer_gradients.h"
#include "cpu/matmul.h"

#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

namespace rlhf_fast {
namespace {

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;
using Rows = std::pair<uintptr_t, int64_t>;

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

// Memory that a thread keeps: fresh pages for every product would cost as much as a small one.
void* matmul_scratch() {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  if (memory == nullptr) {
    constexpr size_t kLine = 64;
    memory.reset(std::aligned_alloc(kLine, (kMatmulScratch + kLine - 1) / kLine * kLine));
    if (memory == nullptr) throw std::bad_alloc();
  }
  return memory.get();
}

// a, b: (address, stride of a row, stride of a column); add, out: (address, stride of a row).
void run_matmul(int64_t rows, int64_t inner, int64_t columns, const Strided& a, const Strided& b,
                const Rows& add, const Rows& out, int threads) {
  MatmulArgs args;
  args.rows = rows;
  args.inner = inner;
  args.columns = columns;
  args.a = at<const float>(std::get<0>(a));
  args.a_row = std::get<1>(a);
  args.a_inner = std::get<2>(a);
  args.b = at<const float>(std::get<0>(b));
  args.b_inner = std::get<1>(b);
  args.b_column = std::get<2>(b);
  args.add = at<const float>(add.first);
  args.add_row = add.second;
  args.out = at<float>(out.first);
  args.out_row = out.second;
  args.scratch = matmul_scratch();
  args.threads = threads;
  const py::gil_scoped_release release;
  matmul(args);
}

using Addresses = std::vector<uintptr_t>;

template <class T>
LayerParameters<T> parameters(const Addresses& all) {
  LayerParameters<T> found;
  T** const fields[] = {&found.input_norm, &found.q,      &found.k,      &found.v,
                        &found.o,          &found.post_norm, &found.gate, &found.up,
                        &found.down,       &found.q_bias, &found.k_bias, &found.v_bias,
                        &found.o_bias,     &found.q_norm, &found.k_norm};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = at<T>(all.at(i));
  return found;
}

// numbers: tokens, hidden, inner, heads, kv_heads, head_dim, segments, window; inputs: addresses of
// cu_seqlens, x, cos, sin; weights, kept: in the order of their structs; sgemm: its address or 0.
DecoderLayerArgs make_layer(const std::vector<int64_t>& numbers, float eps, float scale,
                            const Addresses& inputs, const Addresses& weights,
                            const Addresses& kept, uintptr_t sgemm, int threads) {
  if (sgemm == 0 && !tiles_usable()) throw std::runtime_error("decoder_layer: nothing multiplies");
  DecoderLayerArgs args;
  int64_t* const sizes[] = {&args.tokens,   &args.hidden,   &args.inner,    &args.heads,
                            &args.kv_heads, &args.head_dim, &args.segments, &args.window};
  for (size_t i = 0; i < std::size(sizes); ++i) *sizes[i] = numbers.at(i);
  args.eps = eps;
  args.scale = scale;
  args.cu_seqlens = at<const int32_t>(inputs.at(0));
  args.x = at<const float>(inputs.at(1));
  args.cos = at<const float>(inputs.at(2));
  args.sin = at<const float>(inputs.at(3));
  args.weights = parameters<const float>(weights);
  LayerKept& found = args.kept;
  float** const fields[] = {&found.qkv, &found.q, &found.k,    &found.attended,
                            &found.lse, &found.y, &found.gate, &found.up};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = at<float>(kept.at(i));
  args.sgemm = reinterpret_cast<Sgemm>(sgemm);
  args.scratch = matmul_scratch();
  args.threads = threads;
  return args;
}

void run_layer(DecoderLayerArgs args, uintptr_t out, uintptr_t product) {
  args.out = at<float>(out);
  args.product = at<float>(product);
  const py::gil_scoped_release release;
  decoder_layer_forward(args);
}

void run_layer_backward(DecoderLayerArgs args, uintptr_t above, uintptr_t below,
                        const Addresses& gradients, uintptr_t room) {
  args.above = at<const float>(above);
  args.below = at<float>(below);
  args.gradients = parameters<float>(gradients);
  args.room = at<float>(room);
  const py::gil_scoped_release release;
  decoder_layer_backward(args);
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("matmul", &run_matmul);
  m.def("tiles_usable", &tiles_usable);
  py::class_<DecoderLayerArgs>(m, "DecoderLayer")
      .def(py::init(&make_layer))
      .def("forward", &run_layer)
      .def("backward", &run_layer_backward)
      .def("room", &decoder_layer_room);
  m.def("swiglu", &run_swiglu);
  m.def("rotary", &run_rotary);
  m.def("rms_norm_backward", &run_rms_norm_backward);
}

}  // namespace rlhf_fast
