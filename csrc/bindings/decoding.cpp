// The small ops of a decoding step. Each function here binds an op to its arguments: a BoundOp, which a
// call without arguments runs.
#include "bindings/families.h"

#include "bindings/arguments.h"
#include "bindings/row_ops.h"

namespace rlhf_fast {
namespace {

// ---- sample ------------------------------------------------------------------------------------

// shape: (rows, row stride, vocabulary); settings: addresses of seeds, steps, temperature, top_k,
// top_p, min_p; outputs: of tokens, logprobs, raw_logprobs and entropy or 0.
void bind_sample(py::module_& m) {
  m.def("sample", [](uintptr_t logits, int dtype, const py::tuple& shape,
                     const py::tuple& settings, const py::tuple& outputs, int threads) -> BoundOp {
    SampleArgs args;
    args.logits = reinterpret_cast<const void*>(logits);
    args.dtype = static_cast<DType>(dtype);
    args.rows = shape[0].cast<int64_t>();
    args.row_stride = shape[1].cast<int64_t>();
    args.vocab = shape[2].cast<int64_t>();
    args.seeds = pointer<const int64_t>(settings[0]);
    args.steps = pointer<const int64_t>(settings[1]);
    args.temperature = pointer<const float>(settings[2]);
    args.top_k = pointer<const int64_t>(settings[3]);
    args.top_p = pointer<const float>(settings[4]);
    args.min_p = pointer<const float>(settings[5]);
    args.tokens = pointer<int64_t>(outputs[0]);
    args.logprobs = pointer<float>(outputs[1]);
    args.raw_logprobs = pointer<float>(outputs[2]);
    args.entropy = pointer<float>(outputs[3]);
    args.threads = threads;
    return {args};
  });
}

// ---- rms_norm, silu_mul, linear_small, gather_rows ----------------------------------------------

// Plain integers, which cost least to hand over. A RowsView is an address (0: absent) and the strides of
// [outer, inner].
void bind_decoder_ops(py::module_& m) {
  m.def("rms_norm", [](int dtype, int64_t rows, int64_t inner, int64_t columns, uintptr_t x,
                       int64_t x_outer, int64_t x_inner, uintptr_t weight, uintptr_t residual,
                       int64_t residual_outer, int64_t residual_inner, uintptr_t out,
                       int64_t out_outer, int64_t out_inner, float eps, float offset,
                       int threads) -> BoundOp {
    RmsNormArgs args;
    args.dtype = static_cast<DType>(dtype);
    args.rows = rows;
    args.inner = inner;
    args.columns = columns;
    args.x = {reinterpret_cast<void*>(x), x_outer, x_inner};
    args.weight = reinterpret_cast<const void*>(weight);
    args.residual = {reinterpret_cast<void*>(residual), residual_outer, residual_inner};
    args.out = {reinterpret_cast<void*>(out), out_outer, out_inner};
    args.eps = eps;
    args.offset = offset;
    args.threads = threads;
    return {args};
  });
  m.def("silu_mul", [](int dtype, int64_t rows, int64_t columns, uintptr_t gate_up,
                       int64_t row_stride, uintptr_t out, int64_t out_row_stride,
                       int threads) -> BoundOp {
    SiluMulArgs args;
    args.dtype = static_cast<DType>(dtype);
    args.rows = rows;
    args.columns = columns;
    args.gate_up = reinterpret_cast<const void*>(gate_up);
    args.row_stride = row_stride;
    args.out = reinterpret_cast<void*>(out);
    args.out_row_stride = out_row_stride;
    args.threads = threads;
    return {args};
  });
  m.def("linear_small", [](int64_t rows, int64_t inner, int64_t columns, uintptr_t x,
                           int64_t x_stride, uintptr_t weight, int64_t weight_stride,
                           uintptr_t bias, uintptr_t residual, int64_t residual_stride,
                           uintptr_t out, int64_t out_stride, int threads) -> BoundOp {
    LinearSmallArgs args;
    args.rows = rows;
    args.inner = inner;
    args.columns = columns;
    args.x = reinterpret_cast<const float*>(x);
    args.x_stride = x_stride;
    args.weight = reinterpret_cast<const float*>(weight);
    args.weight_stride = weight_stride;
    args.bias = reinterpret_cast<const float*>(bias);
    args.residual = reinterpret_cast<const float*>(residual);
    args.residual_stride = residual_stride;
    args.out = reinterpret_cast<float*>(out);
    args.out_stride = out_stride;
    args.threads = threads;
    return {args};
  });
  m.def("gather_rows", [](int64_t rows, int64_t row_bytes, uintptr_t table, int64_t table_stride,
                          uintptr_t ids, uintptr_t out, int64_t out_stride) -> BoundOp {
    GatherRowsArgs args;
    args.rows = rows;
    args.row_bytes = row_bytes;
    args.table = reinterpret_cast<const void*>(table);
    args.table_stride = table_stride;
    args.ids = reinterpret_cast<const int64_t*>(ids);
    args.out = reinterpret_cast<void*>(out);
    args.out_stride = out_stride;
    return {args};
  });
}

// ---- decode_state ------------------------------------------------------------------------------

void bind_decode_state(py::module_& m) {
  m.def("place_tokens", [](int64_t rows, uintptr_t state, int64_t field_stride,
                           uintptr_t page_table, int64_t table_stride, int64_t page_size,
                           uintptr_t ids, uintptr_t positions, uintptr_t slots,
                           uintptr_t contexts) -> BoundOp {
    PlaceTokensArgs args;
    args.rows = rows;
    args.state = reinterpret_cast<int64_t*>(state);
    args.field_stride = field_stride;
    args.page_table = reinterpret_cast<const int32_t*>(page_table);
    args.table_stride = table_stride;
    args.page_size = page_size;
    args.ids = reinterpret_cast<int64_t*>(ids);
    args.positions = reinterpret_cast<int64_t*>(positions);
    args.slots = reinterpret_cast<int64_t*>(slots);
    args.contexts = reinterpret_cast<int32_t*>(contexts);
    return {args};
  });
  m.def("record_tokens", [](int64_t rows, uintptr_t state, int64_t field_stride, uintptr_t stops,
                            int64_t stop_width, uintptr_t tokens, uintptr_t logprobs,
                            uintptr_t raw_logprobs, int64_t columns, uintptr_t out_tokens,
                            uintptr_t out_logprobs, uintptr_t out_raw_logprobs,
                            uintptr_t out_lengths, uintptr_t out_ended) -> BoundOp {
    RecordTokensArgs args;
    args.rows = rows;
    args.state = reinterpret_cast<int64_t*>(state);
    args.field_stride = field_stride;
    args.stops = reinterpret_cast<const int64_t*>(stops);
    args.stop_width = stop_width;
    args.tokens = reinterpret_cast<const int64_t*>(tokens);
    args.logprobs = reinterpret_cast<const float*>(logprobs);
    args.raw_logprobs = reinterpret_cast<const float*>(raw_logprobs);
    args.columns = columns;
    args.out_tokens = reinterpret_cast<int64_t*>(out_tokens);
    args.out_logprobs = reinterpret_cast<float*>(out_logprobs);
    args.out_raw_logprobs = reinterpret_cast<float*>(out_raw_logprobs);
    args.out_lengths = reinterpret_cast<int64_t*>(out_lengths);
    args.out_ended = reinterpret_cast<bool*>(out_ended);
    return {args};
  });
}

}  // namespace

void bind_decoding(py::module_& m) {
  bind_sample(m);
  bind_decode_state(m);
  bind_decoder_ops(m);
}

}  // namespace rlhf_fast
