// The only pybind11 file: rlhf_fast_kernels._core.
//
// A tensor arrives as a tuple (address, dtype, row stride, column stride), a mask as (address, row
// stride, column stride), an absent optional one as None; rlhf_fast_kernels/native.py builds them.
// Kernels run with the GIL released. Python has validated shapes and dtypes before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/kl_from_logits.h"
#include "cpu/linear_small.h"
#include "cpu/logprobs_from_logits.h"
#include "cpu/paged_attention.h"
#include "cpu/ppo_loss.h"
#include "cpu/rewards_and_gae.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_and_store.h"
#include "cpu/sample.h"
#include "cpu/silu_mul.h"
#include "cpu/whiten.h"
#include "host/cpu_features.h"
#include "host/kv_pages.h"
#include "host/tensor_view.h"

#ifdef RLHF_FAST_WITH_CUDA
#include "cuda/device.h"
#include "cuda/ppo_loss.h"
#include "cuda/rewards_and_gae.h"
#include "cuda/whiten.h"
#endif

namespace py = pybind11;

namespace rlhf_fast {
namespace {

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

View to_view(py::handle tensor) {
  View view;
  if (tensor.is_none()) return view;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  view.data = pointer<const void>(fields[0]);
  view.dtype = static_cast<DType>(fields[1].cast<int32_t>());
  view.row_stride = fields[2].cast<int64_t>();
  view.column_stride = fields[3].cast<int64_t>();
  return view;
}

MaskView to_mask(py::handle tensor) {
  MaskView view;
  if (tensor.is_none()) return view;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  view.data = pointer<const uint8_t>(fields[0]);
  view.row_stride = fields[1].cast<int64_t>();
  view.column_stride = fields[2].cast<int64_t>();
  return view;
}

// ---- where an op runs -------------------------------------------------------------------------

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

// ---- rewards_and_gae --------------------------------------------------------------------------

// shape: (rows, columns, tokens, cu_seqlens address or 0, whether the offsets are int64); outputs:
// addresses of advantages, returns and, unless rewards are given, rewards, kl and moments.
RewardsAndGaeArgs make_gae_args(const py::tuple& shape, py::handle values, py::handle mask,
                                py::handle bootstrap, float gamma, float gae_lambda,
                                const py::tuple& outputs) {
  RewardsAndGaeArgs args;
  args.rows = shape[0].cast<int64_t>();
  args.columns = shape[1].cast<int64_t>();
  args.tokens = shape[2].cast<int64_t>();
  args.cu_seqlens = pointer<const void>(shape[3]);
  args.wide_offsets = shape[4].cast<bool>();
  args.values = to_view(values);
  args.mask = to_mask(mask);
  args.bootstrap = to_view(bootstrap);
  args.gamma = gamma;
  args.gae_lambda = gae_lambda;
  args.out_advantages = pointer<float>(outputs[0]);
  args.out_returns = pointer<float>(outputs[1]);
  if (outputs.size() == 5) {
    args.out_rewards = pointer<float>(outputs[2]);
    args.out_kl = pointer<float>(outputs[3]);
    args.out_moments = pointer<double>(outputs[4]);
  }
  return args;
}

float or_infinity(py::handle bound) {
  return bound.is_none() ? std::numeric_limits<float>::infinity() : bound.cast<float>();
}

// source: (old_logprobs, ref_logprobs, kl, scores, scores_per_token); settings: (estimator, kl_coef,
// kl_in_reward, log_ratio_clamp, reward_clip)
void set_rewards(RewardsAndGaeArgs& args, const py::tuple& source, const py::tuple& settings) {
  args.old_logprobs = to_view(source[0]);
  args.ref_logprobs = to_view(source[1]);
  args.kl = to_view(source[2]);
  args.scores = to_view(source[3]);
  args.scores_per_token = source[4].cast<bool>();
  args.kl_estimator = static_cast<KlEstimator>(settings[0].cast<int32_t>());
  args.kl_coef = settings[1].cast<float>();
  args.kl_in_reward = settings[2].cast<bool>();
  args.log_ratio_clamp = or_infinity(settings[3]);
  args.reward_clip = or_infinity(settings[4]);
}

void bind_rewards_and_gae(py::module_& m) {
  m.def("gae", [](const py::tuple& shape, py::handle rewards, py::handle values, py::handle mask,
                  py::handle bootstrap, float gamma, float gae_lambda, const py::tuple& outputs,
                  py::handle placement) {
    auto args = make_gae_args(shape, values, mask, bootstrap, gamma, gae_lambda, outputs);
    args.rewards = to_view(rewards);
    run_placed("gae", args, placement, &rewards_and_gae, RLHF_FAST_CUDA_OP(rewards_and_gae));
  });
  m.def("rewards_and_gae", [](const py::tuple& shape, const py::tuple& source,
                              const py::tuple& settings, py::handle values, py::handle mask,
                              py::handle bootstrap, float gamma, float gae_lambda,
                              const py::tuple& outputs, py::handle placement) {
    auto args = make_gae_args(shape, values, mask, bootstrap, gamma, gae_lambda, outputs);
    set_rewards(args, source, settings);
    run_placed("rewards_and_gae", args, placement, &rewards_and_gae,
               RLHF_FAST_CUDA_OP(rewards_and_gae));
  });
}

// ---- whiten -----------------------------------------------------------------------------------

void bind_whiten(py::module_& m) {
  m.attr("MOMENTS_CHUNK") = kMomentsChunk;
  // partials: room for the moments of every MOMENTS_CHUNK elements; CUDA only.
  m.def("masked_moments", [](int64_t rows, int64_t columns, py::handle x, py::handle mask,
                             uintptr_t partials, uintptr_t out, py::handle placement) {
    MaskedMomentsArgs args;
    args.rows = rows;
    args.columns = columns;
    args.x = to_view(x);
    args.mask = to_mask(mask);
    args.partials = reinterpret_cast<double*>(partials);
    args.out = reinterpret_cast<double*>(out);
    run_placed("masked_moments", args, placement, &masked_moments,
               RLHF_FAST_CUDA_OP(masked_moments));
  });
  // stats: (address, number of sets, address of room for one set; CUDA only)
  m.def("whiten", [](int64_t rows, int64_t columns, py::handle x, py::handle mask,
                     const py::tuple& stats, bool shift_mean, bool unbiased, double eps,
                     uintptr_t out, py::handle placement) {
    WhitenArgs args;
    args.rows = rows;
    args.columns = columns;
    args.x = to_view(x);
    args.mask = to_mask(mask);
    args.stats = pointer<const double>(stats[0]);
    args.sets = stats[1].cast<int64_t>();
    args.merged = pointer<double>(stats[2]);
    args.shift_mean = shift_mean;
    args.unbiased = unbiased;
    args.eps = eps;
    args.out = reinterpret_cast<float*>(out);
    run_placed("whiten", args, placement, &whiten, RLHF_FAST_CUDA_OP(whiten));
  });
}

// ---- logprobs_from_logits ---------------------------------------------------------------------

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

// ---- kl_from_logits ---------------------------------------------------------------------------

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

// ---- ppo_loss ---------------------------------------------------------------------------------

TokenTensor to_tokens(const py::tuple& tensors, size_t index) {
  TokenTensor tensor;
  if (tensors[index].is_none()) return tensor;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensors[index]);
  tensor.data = pointer<const void>(fields[0]);
  tensor.dtype = static_cast<DType>(fields[1].cast<int32_t>());
  return tensor;
}

void set_ppo_tensors(PpoLossArgs& args, const py::tuple& tensors) {
  args.logprobs = to_tokens(tensors, 0);
  args.old_logprobs = to_tokens(tensors, 1);
  args.advantages = to_tokens(tensors, 2);
  args.entropy = to_tokens(tensors, 3);
  args.ref_logprobs = to_tokens(tensors, 4);
  args.weights = to_tokens(tensors, 5);
  args.values = to_tokens(tensors, 6);
  args.old_values = to_tokens(tensors, 7);
  args.returns = to_tokens(tensors, 8);
  args.kl = to_tokens(tensors, 9);
}

void set_ppo_settings(PpoLossArgs& args, const py::tuple& settings) {
  const auto number = [&settings](size_t index) {
    return settings[index].is_none() ? std::numeric_limits<double>::infinity()
                                     : settings[index].cast<double>();
  };
  args.clip_eps_low = number(0);
  args.clip_eps_high = number(1);
  args.dual_clip = number(2);
  args.entropy_coef = number(3);
  args.kl_coef = number(4);
  args.kl_estimator = static_cast<KlEstimator>(settings[5].cast<int32_t>());
  args.own_kl_gradient = settings[6].cast<bool>();
  args.value_clip_eps = number(7);
  args.value_coef = number(8);
  args.log_ratio_clamp = number(9);
  if (settings[7].is_none()) args.old_values = TokenTensor();
}

// normalizer: a number, or (address on the device, its type); placement: number of CPU threads, or
// (CUDA device, stream handle, address of the workspace).
void run_ppo_loss(PpoLossArgs& args, py::handle normalizer, py::handle placement) {
  if (py::isinstance<py::int_>(placement)) {
    args.normalizer = normalizer.cast<double>();
    args.threads = placement.cast<int>();
    const py::gil_scoped_release release;
    ppo_loss(args);
    return;
  }
#ifdef RLHF_FAST_WITH_CUDA
  DeviceNumber on_device;
  if (py::isinstance<py::tuple>(normalizer)) {
    const auto [address, type] = normalizer.cast<std::pair<uintptr_t, int32_t>>();
    on_device.data = reinterpret_cast<const void*>(address);
    on_device.type = static_cast<DeviceNumber::Type>(type);
  } else {
    args.normalizer = normalizer.cast<double>();
  }
  const auto [device, stream, workspace] =
      placement.cast<std::tuple<int, uintptr_t, uintptr_t>>();
  std::string error;
  {
    const py::gil_scoped_release release;
    error = ppo_loss_cuda(args, on_device, reinterpret_cast<double*>(workspace), device,
                          reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("ppo_loss (cuda): " + error);
#else
  throw std::runtime_error("ppo_loss (cuda): this build has no CUDA code");
#endif
}

void bind_ppo_loss(py::module_& m) {
  m.def("ppo_loss", [](const py::tuple& tensors, uintptr_t mask, int64_t tokens,
                       py::handle normalizer, const py::tuple& settings, const py::tuple& outputs,
                       py::handle placement) {
    PpoLossArgs args;
    args.tokens = tokens;
    args.mask = reinterpret_cast<const uint8_t*>(mask);
    set_ppo_tensors(args, tensors);
    set_ppo_settings(args, settings);
    args.loss = pointer<float>(outputs[0]);
    args.sums = pointer<float>(outputs[1]);
    args.extrema = pointer<float>(outputs[2]);
    args.d_logprobs = pointer<float>(outputs[3]);
    args.d_entropy = pointer<float>(outputs[4]);
    args.d_values = pointer<float>(outputs[5]);
    args.d_kl = pointer<float>(outputs[6]);
    run_ppo_loss(args, normalizer, placement);
  });
#ifdef RLHF_FAST_WITH_CUDA
  m.def("ppo_loss_workspace", &ppo_loss_workspace, "Doubles that a CUDA call works in.");
  // from: four addresses or 0; to: as many (address, dtype) or None.
  m.def("ppo_loss_scale", [](const py::tuple& from, const py::tuple& to, int64_t tokens,
                             uintptr_t upstream, int device, uintptr_t stream) {
    PpoScaleArgs args;
    args.tokens = tokens;
    args.upstream = reinterpret_cast<const float*>(upstream);
    for (int k = 0; k < PpoScaleArgs::kGradients; ++k) {
      args.from[k] = pointer<const float>(from[k]);
      args.to[k] = to_tokens(to, k);
    }
    std::string error;
    {
      const py::gil_scoped_release release;
      error = ppo_loss_scale_cuda(args, device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("ppo_loss (cuda): " + error);
  });
#endif
}

// ---- sample -----------------------------------------------------------------------------------

// shape: (rows, row stride, vocabulary); settings: addresses of seeds, steps, temperature, top_k, top_p,
// min_p; outputs: of tokens, logprobs, raw_logprobs and entropy or 0.
void bind_sample(py::module_& m) {
  m.def("sample", [](uintptr_t logits, int dtype, const py::tuple& shape,
                     const py::tuple& settings, const py::tuple& outputs, int threads) {
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
    const py::gil_scoped_release release;
    sample(args);
  });
}

// ---- rms_norm, silu_mul, linear_small ---------------------------------------------------------

// Below this many elements the call is over before another thread would have got the GIL.
constexpr int64_t kElementsWithGil = 16384;

template <class Args>
void run_short(void (*op)(const Args&), const Args& args) {
  if (args.rows * args.columns <= kElementsWithGil) return op(args);
  const py::gil_scoped_release release;
  op(args);
}

// Called several times a layer and token: plain integers, which cost least to hand over. A RowsView is
// an address (0: absent) and the strides of [outer, inner].
void bind_decoder_ops(py::module_& m) {
  m.def("rms_norm", [](int dtype, int64_t rows, int64_t inner, int64_t columns, uintptr_t x,
                       int64_t x_outer, int64_t x_inner, uintptr_t weight, uintptr_t residual,
                       int64_t residual_outer, int64_t residual_inner, uintptr_t out,
                       int64_t out_outer, int64_t out_inner, float eps, float offset,
                       int threads) {
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
    run_short(&rms_norm, args);
  });
  m.def("silu_mul", [](int dtype, int64_t rows, int64_t columns, uintptr_t gate_up,
                       int64_t row_stride, uintptr_t out, int64_t out_row_stride, int threads) {
    SiluMulArgs args;
    args.dtype = static_cast<DType>(dtype);
    args.rows = rows;
    args.columns = columns;
    args.gate_up = reinterpret_cast<const void*>(gate_up);
    args.row_stride = row_stride;
    args.out = reinterpret_cast<void*>(out);
    args.out_row_stride = out_row_stride;
    args.threads = threads;
    run_short(&silu_mul, args);
  });
  m.def("linear_small", [](int64_t rows, int64_t inner, int64_t columns, uintptr_t x,
                           int64_t x_stride, uintptr_t weight, int64_t weight_stride,
                           uintptr_t bias, uintptr_t residual, int64_t residual_stride,
                           uintptr_t out, int64_t out_stride, int threads) {
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
    const py::gil_scoped_release release;
    linear_small(args);
  });
}

// ---- kv_pages ---------------------------------------------------------------------------------

const int64_t* integers(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

// Batches are addresses of contiguous int64 arrays and their number of elements. The GIL is kept: it
// is what makes a call of several threads one after the other, and a call takes microseconds.
void bind_kv_pages(py::module_& m) {
  py::class_<PageAllocator>(m, "PageAllocator")
      .def(py::init<int64_t, int64_t>())
      .def("create", &PageAllocator::create)
      .def("release", &PageAllocator::release)
      .def("fork", &PageAllocator::fork)
      // The number of pages missing; if none are, minus the number of pages to copy, whose pairs
      // `copies` then writes.
      .def("extend",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             const int64_t missing = self.extend(integers(handles), integers(lengths), count);
             return missing > 0 ? missing : -static_cast<int64_t>(self.copies().size() / 2);
           })
      .def("copies",
           [](const PageAllocator& self, uintptr_t out) {
             std::copy(self.copies().begin(), self.copies().end(),
                       reinterpret_cast<int32_t*>(out));
           })
      .def("pages_needed",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             return self.pages_needed(integers(handles), integers(lengths), count);
           })
      .def("truncate",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             self.truncate(integers(handles), integers(lengths), count);
           })
      .def("fill_table",
           [](const PageAllocator& self, uintptr_t handles, int64_t count, uintptr_t out,
              int64_t columns, int64_t row_stride) {
             self.fill_table(integers(handles), count, reinterpret_cast<int32_t*>(out), columns,
                             row_stride);
           })
      .def("fill_slots",
           [](const PageAllocator& self, uintptr_t handles, uintptr_t starts, uintptr_t counts,
              int64_t count, uintptr_t out, int64_t capacity) {
             return self.fill_slots(integers(handles), integers(starts), integers(counts), count,
                                    reinterpret_cast<int64_t*>(out), capacity);
           })
      .def("length", &PageAllocator::length)
      .def("pages", &PageAllocator::pages)
      .def("take_freed", &PageAllocator::take_freed)
      .def("check", &PageAllocator::check)
      .def("free_pages", &PageAllocator::free_pages)
      .def("used_pages", &PageAllocator::used_pages)
      .def("live_handles", &PageAllocator::live_handles);
}

// ---- paged_attention, rope_and_store ------------------------------------------------------------
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

void bind_paged_attention(py::module_& m) {
  py::class_<PagedAttentionArgs>(m, "PagedAttention")
      .def(py::init(&make_paged_attention))
      .def("__call__", [](PagedAttentionArgs args, uintptr_t q, uintptr_t keys, uintptr_t values,
                          uintptr_t out, int threads) {
        args.q = reinterpret_cast<const void*>(q);
        args.keys = reinterpret_cast<const void*>(keys);
        args.values = reinterpret_cast<const void*>(values);
        args.out = reinterpret_cast<void*>(out);
        args.threads = threads;
        const py::gil_scoped_release release;
        paged_attention(args);
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

void bind_rope_and_store(py::module_& m) {
  py::class_<RopeAndStoreArgs>(m, "RopeAndStore")
      .def(py::init(&make_rope_and_store))
      .def("__call__", [](RopeAndStoreArgs args, uintptr_t q, uintptr_t k, uintptr_t v,
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
        const py::gil_scoped_release release;
        rope_and_store(args);
      });
}

// ---- what this build is -----------------------------------------------------------------------

py::dict build_info() {
  py::dict info;
  info["compiler"] = RLHF_FAST_COMPILER;
#ifdef RLHF_FAST_WITH_CUDA
  info["cuda"] = cuda_toolkit_version();
  info["cuda_archs"] = RLHF_FAST_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

void bind_build(py::module_& m) {
  m.def("build_info", &build_info, "Compiler, CUDA toolkit and architectures of this build.");
  m.def("cpu_features", &describe_cpu, "The instruction set in use and those available.");
#ifdef RLHF_FAST_WITH_CUDA
  m.def("cuda_status", &cuda_status, "State of the CUDA driver as text; never raises.");
  m.def("cuda_unusable_reason", &cuda_unusable_reason,
        "'' if kernels of this build run on the device, otherwise why not; never raises.");
#else
  m.def("cuda_status", [] { return std::string("built without CUDA"); });
  m.def("cuda_unusable_reason", [](int) { return std::string("built without CUDA"); });
#endif
}

}  // namespace
}  // namespace rlhf_fast

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled ops of rlhf_fast_kernels; use the Python functions of that package instead.";
  rlhf_fast::bind_build(m);
  rlhf_fast::bind_rewards_and_gae(m);
  rlhf_fast::bind_whiten(m);
  rlhf_fast::bind_logprobs_from_logits(m);
  rlhf_fast::bind_kl_from_logits(m);
  rlhf_fast::bind_ppo_loss(m);
  rlhf_fast::bind_sample(m);
  rlhf_fast::bind_decoder_ops(m);
  rlhf_fast::bind_kv_pages(m);
  rlhf_fast::bind_paged_attention(m);
  rlhf_fast::bind_rope_and_store(m);
}
