// Log-probs and KL of [tokens, vocab] logits.
#include "bindings/families.h"

#include "bindings/arguments.h"
#include "cpu/kl_from_logits.h"
#include "cpu/logprobs_from_logits.h"

namespace rlhf_fast {
namespace {

// ---- logprobs_from_logits ----------------------------------------------------------------------

// logits: (address, dtype, outer, inner, outer stride, inner stride); settings: (columns, vocab_start,
// vocab_size, ignore_index, address of the temperatures or 0, scalar temperature, softcap or 0).
LogitRows to_logit_rows(const py::tuple& logits, const py::tuple& settings, uintptr_t labels,
                        int threads) {
  LogitRows rows;
  rows.logits = pointer<const void>(logits[0]);
  rows.dtype = static_cast<DType>(logits[1].cast<int32_t>());
  rows.outer = logits[2].cast<int64_t>();
  rows.inner = logits[3].cast<int64_t>();
  rows.outer_stride = logits[4].cast<int64_t>();
  rows.inner_stride = logits[5].cast<int64_t>();
  rows.columns = settings[0].cast<int64_t>();
  rows.vocab_start = settings[1].cast<int64_t>();
  rows.vocab_size = settings[2].cast<int64_t>();
  rows.ignore_index = settings[3].cast<int64_t>();
  rows.temperature = pointer<const float>(settings[4]);
  rows.scalar_temperature = settings[5].cast<double>();
  rows.softcap = settings[6].cast<double>();
  rows.labels = reinterpret_cast<const int64_t*>(labels);
  rows.threads = threads;
  return rows;
}

// outputs: addresses of logprobs, entropy (or 0) and lse; stats and upstream: of entropy (or 0) and
// lse, and of the gradients of logprobs and entropy (or 0); grad: (address, dtype, outer stride, inner
// stride, width).
void bind_logprobs_from_logits(py::module_& m) {
  m.def("logprobs_from_logits_forward",
        [](const py::tuple& logits, const py::tuple& settings, uintptr_t labels, int64_t count,
           uintptr_t row_of, bool shard, const py::tuple& outputs, int threads) {
          LogprobsForwardArgs args;
          args.rows = to_logit_rows(logits, settings, labels, threads);
          args.count = count;
          args.row_of = reinterpret_cast<const int64_t*>(row_of);
          args.shard = shard;
          args.logprobs = pointer<float>(outputs[0]);
          args.entropy = pointer<float>(outputs[1]);
          args.lse = pointer<double>(outputs[2]);
          const py::gil_scoped_release release;
          logprobs_from_logits_forward(args);
        });
  m.def("logprobs_from_logits_backward",
        [](const py::tuple& logits, const py::tuple& settings, uintptr_t labels, uintptr_t slot_of,
           const py::tuple& stats, const py::tuple& upstream, const py::tuple& grad, int threads) {
          LogprobsBackwardArgs args;
          args.rows = to_logit_rows(logits, settings, labels, threads);
          args.slot_of = reinterpret_cast<const int64_t*>(slot_of);
          args.entropy = pointer<const float>(stats[0]);
          args.lse = pointer<const double>(stats[1]);
          args.grad_logprobs = pointer<const float>(upstream[0]);
          args.grad_entropy = pointer<const float>(upstream[1]);
          args.grad_logits = pointer<void>(grad[0]);
          args.grad_dtype = static_cast<DType>(grad[1].cast<int32_t>());
          args.grad_outer_stride = grad[2].cast<int64_t>();
          args.grad_inner_stride = grad[3].cast<int64_t>();
          args.width = grad[4].cast<int64_t>();
          const py::gil_scoped_release release;
          logprobs_from_logits_backward(args);
        });
}

// ---- kl_from_logits ----------------------------------------------------------------------------

// side: (address, dtype, outer, inner, outer stride, inner stride).
KlSide to_kl_side(const py::tuple& side) {
  KlSide view;
  view.data = pointer<void>(side[0]);
  view.dtype = static_cast<DType>(side[1].cast<int32_t>());
  view.outer = side[2].cast<int64_t>();
  view.inner = side[3].cast<int64_t>();
  view.outer_stride = side[4].cast<int64_t>();
  view.inner_stride = side[5].cast<int64_t>();
  return view;
}

// settings: (columns, address of the temperatures or 0, scalar temperature, softcaps or 0).
KlRows to_kl_rows(const py::tuple& actor, const py::tuple& reference, const py::tuple& settings,
                  int threads) {
  KlRows rows;
  rows.actor = to_kl_side(actor);
  rows.reference = to_kl_side(reference);
  rows.columns = settings[0].cast<int64_t>();
  rows.temperature = pointer<const float>(settings[1]);
  rows.scalar_temperature = settings[2].cast<double>();
  rows.actor.softcap = settings[3].cast<double>();
  rows.reference.softcap = settings[4].cast<double>();
  rows.threads = threads;
  return rows;
}

// outputs: addresses of kl, lse and ref_lse; stats: those and grad_kl.
void bind_kl_from_logits(py::module_& m) {
  m.def("kl_from_logits_forward",
        [](const py::tuple& actor, const py::tuple& reference, const py::tuple& settings,
           uintptr_t mask, bool shard, const py::tuple& outputs, int threads) {
          KlForwardArgs args;
          args.rows = to_kl_rows(actor, reference, settings, threads);
          args.mask = reinterpret_cast<const uint8_t*>(mask);
          args.shard = shard;
          args.kl = pointer<float>(outputs[0]);
          args.lse = pointer<double>(outputs[1]);
          args.ref_lse = pointer<double>(outputs[2]);
          const py::gil_scoped_release release;
          kl_from_logits_forward(args);
        });
  m.def("kl_from_logits_backward",
        [](const py::tuple& actor, const py::tuple& reference, const py::tuple& settings,
           const py::tuple& stats, const py::tuple& grad, int64_t width, bool accumulate,
           int threads) {
          KlBackwardArgs args;
          args.rows = to_kl_rows(actor, reference, settings, threads);
          args.kl = pointer<const float>(stats[0]);
          args.lse = pointer<const double>(stats[1]);
          args.ref_lse = pointer<const double>(stats[2]);
          args.grad_kl = pointer<const float>(stats[3]);
          args.grad = to_kl_side(grad);
          args.width = width;
          args.accumulate = accumulate;
          const py::gil_scoped_release release;
          kl_from_logits_backward(args);
        });
}

}  // namespace

void bind_logprobs(py::module_& m) {
  bind_logprobs_from_logits(m);
  bind_kl_from_logits(m);
}

}  // namespace rlhf_fast
