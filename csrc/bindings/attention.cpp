// Attention over pages, and inside the segments of a packed batch.
#include "bindings/families.h"

#include "bindings/arguments.h"
#include "bindings/row_ops.h"
#include "cpu/packed_attention.h"

namespace rlhf_fast {
namespace {

//
// Everything but the addresses of a layer's tensors is put into an object once: the engine calls it for
// every layer of a step, and then the tuples would cost more than the work.

template <size_t count>
void set_strides(int64_t (&strides)[count], py::handle values) {
  const auto fields = py::reinterpret_borrow<py::tuple>(values);
  for (size_t i = 0; i < count; ++i) strides[i] = fields[i].cast<int64_t>();
}

// shape: (sequences, query heads, kv heads, head dim, page size); strides: of q,
// keys, values, out, table; indices: addresses of page_table, context_lengths, cu_queries or 0.
PagedAttentionArgs make_paged_attention(int dtype, const py::tuple& shape, const py::tuple& strides,
                                        const py::tuple& indices, float scale, float softcap,
                                        int64_t window) {
  PagedAttentionArgs args;
  args.dtype = static_cast<DType>(dtype);
  args.sequences = shape[0].cast<int64_t>();
  args.query_heads = shape[1].cast<int64_t>();
  args.kv_heads = shape[2].cast<int64_t>();
  args.head_dim = shape[3].cast<int64_t>();
  args.page_size = shape[4].cast<int64_t>();
  set_strides(args.q_strides, strides[0]);
  set_strides(args.key_strides, strides[1]);
  set_strides(args.value_strides, strides[2]);
  set_strides(args.out_strides, strides[3]);
  args.table_stride = strides[4].cast<int64_t>();
  args.page_table = pointer<const int32_t>(indices[0]);
  args.context_lengths = pointer<const int32_t>(indices[1]);
  args.cu_queries = pointer<const int32_t>(indices[2]);
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  return args;
}

PagedAttentionArgs of_layer(PagedAttentionArgs args, uintptr_t q, uintptr_t keys, uintptr_t values,
                            uintptr_t out, int threads) {
  args.q = reinterpret_cast<const void*>(q);
  args.keys = reinterpret_cast<const void*>(keys);
  args.values = reinterpret_cast<const void*>(values);
  args.out = reinterpret_cast<void*>(out);
  args.threads = threads;
  return args;
}

void bind_paged_attention(py::module_& m) {
  py::class_<PagedAttentionArgs>(m, "PagedAttention")
      .def(py::init(&make_paged_attention))
      .def("__call__", [](const PagedAttentionArgs& self, uintptr_t q, uintptr_t keys,
                          uintptr_t values, uintptr_t out, int threads) {
        const PagedAttentionArgs args = of_layer(self, q, keys, values, out, threads);
        const py::gil_scoped_release release;
        paged_attention(args);
      })
      .def("bind", [](const PagedAttentionArgs& self, uintptr_t q, uintptr_t keys,
                      uintptr_t values, uintptr_t out, int threads) -> BoundOp {
        return {of_layer(self, q, keys, values, out, threads)};
      });
}

// shape: (tokens, query heads, kv heads, head dim, rotary dim, page size);
// strides: of q, k, v, keys, values, cos, sin; indices: addresses of slots, positions, cos, sin.
RopeAndStoreArgs make_rope_and_store(int dtype, const py::tuple& shape, const py::tuple& strides,
                                     const py::tuple& indices, float norm_eps) {
  RopeAndStoreArgs args;
  args.dtype = static_cast<DType>(dtype);
  args.tokens = shape[0].cast<int64_t>();
  args.query_heads = shape[1].cast<int64_t>();
  args.kv_heads = shape[2].cast<int64_t>();
  args.head_dim = shape[3].cast<int64_t>();
  args.rotary_dim = shape[4].cast<int64_t>();
  args.page_size = shape[5].cast<int64_t>();
  set_strides(args.q_strides, strides[0]);
  set_strides(args.k_strides, strides[1]);
  set_strides(args.v_strides, strides[2]);
  set_strides(args.key_strides, strides[3]);
  set_strides(args.value_strides, strides[4]);
  args.cos_stride = strides[5].cast<int64_t>();
  args.sin_stride = strides[6].cast<int64_t>();
  args.slots = pointer<const int64_t>(indices[0]);
  args.positions = pointer<const int64_t>(indices[1]);
  args.cos = pointer<const float>(indices[2]);
  args.sin = pointer<const float>(indices[3]);
  args.norm_eps = norm_eps;
  return args;
}

RopeAndStoreArgs of_layer(RopeAndStoreArgs args, uintptr_t q, uintptr_t k, uintptr_t v,
                          uintptr_t keys, uintptr_t values, uintptr_t q_norm, uintptr_t k_norm,
                          int threads) {
  args.q = reinterpret_cast<void*>(q);
  args.k = reinterpret_cast<const void*>(k);
  args.v = reinterpret_cast<const void*>(v);
  args.keys = reinterpret_cast<void*>(keys);
  args.values = reinterpret_cast<void*>(values);
  args.q_norm = reinterpret_cast<const void*>(q_norm);
  args.k_norm = reinterpret_cast<const void*>(k_norm);
  args.threads = threads;
  return args;
}

void bind_rope_and_store(py::module_& m) {
  py::class_<RopeAndStoreArgs>(m, "RopeAndStore")
      .def(py::init(&make_rope_and_store))
      .def("__call__", [](const RopeAndStoreArgs& self, uintptr_t q, uintptr_t k, uintptr_t v,
                          uintptr_t keys, uintptr_t values, uintptr_t q_norm, uintptr_t k_norm,
                          int threads) {
        const RopeAndStoreArgs args = of_layer(self, q, k, v, keys, values, q_norm, k_norm, threads);
        const py::gil_scoped_release release;
        rope_and_store(args);
      })
      .def("bind", [](const RopeAndStoreArgs& self, uintptr_t q, uintptr_t k, uintptr_t v,
                      uintptr_t keys, uintptr_t values, uintptr_t q_norm, uintptr_t k_norm,
                      int threads) -> BoundOp {
        return {of_layer(self, q, k, v, keys, values, q_norm, k_norm, threads)};
      });
}

// (address, token stride, head stride)
HeadsView to_heads(py::handle tensor) {
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  return {pointer<void>(fields[0]), fields[1].cast<int64_t>(), fields[2].cast<int64_t>()};
}

// shape: (segments, query heads, kv heads, head dim); heads: of q, k, v, out and, for the gradients,
// grad_out, grad_q, grad_k, grad_v.
PackedAttentionArgs packed_attention_args(int dtype, const py::tuple& shape, uintptr_t cu_seqlens,
                                          float scale, int64_t window, const py::tuple& heads,
                                          uintptr_t lse, int threads) {
  PackedAttentionArgs args;
  args.dtype = static_cast<DType>(dtype);
  args.segments = shape[0].cast<int64_t>();
  args.query_heads = shape[1].cast<int64_t>();
  args.kv_heads = shape[2].cast<int64_t>();
  args.head_dim = shape[3].cast<int64_t>();
  args.cu_seqlens = reinterpret_cast<const int32_t*>(cu_seqlens);
  args.scale = scale;
  args.window = window;
  HeadsView* const views[] = {&args.q,        &args.k,      &args.v,      &args.out,
                              &args.grad_out, &args.grad_q, &args.grad_k, &args.grad_v};
  for (size_t i = 0; i < heads.size(); ++i) *views[i] = to_heads(heads[i]);
  args.lse = reinterpret_cast<float*>(lse);
  args.threads = threads;
  return args;
}

template <void (*run)(const PackedAttentionArgs&)>
void run_packed(int dtype, const py::tuple& shape, uintptr_t cu_seqlens, float scale, int64_t window,
                const py::tuple& heads, uintptr_t lse, int threads) {
  const PackedAttentionArgs args =
      packed_attention_args(dtype, shape, cu_seqlens, scale, window, heads, lse, threads);
  const py::gil_scoped_release release;
  run(args);
}

void bind_packed_attention(py::module_& m) {
  m.def("packed_attention", &run_packed<packed_attention>);
  m.def("packed_attention_backward", &run_packed<packed_attention_backward>);
}

}  // namespace

void bind_attention(py::module_& m) {
  bind_packed_attention(m);
  bind_paged_attention(m);
  bind_rope_and_store(m);
}

}  // namespace rlhf_fast
