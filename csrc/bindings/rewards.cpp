// Rewards, advantages and whitening.
#include "bindings/families.h"

#include <limits>

#include "bindings/arguments.h"
#include "cpu/rewards_and_gae.h"
#include "cpu/whiten.h"

#ifdef RLHF_FAST_WITH_CUDA
#include "cuda/rewards_and_gae.h"
#include "cuda/whiten.h"
#endif

namespace rlhf_fast {
namespace {

// ---- rewards_and_gae ---------------------------------------------------------------------------

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

// ---- whiten ------------------------------------------------------------------------------------

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

}  // namespace

void bind_rewards(py::module_& m) {
  bind_rewards_and_gae(m);
  bind_whiten(m);
}

}  // namespace rlhf_fast
