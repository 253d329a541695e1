// The formulas of ppo_loss for one number type, shared by csrc/cpu/ppo_loss.cpp (a vector of tokens) and
// csrc/cuda/ppo_loss.cu (one token). They are those of kernels/rlhf_fast_kernels/ppo_loss.py, ties and
// clamps included.
//
// Included inside a namespace, so that each instruction set keeps its own copy (csrc/cpu/isa.h). The
// includer provides there
//
//     RLHF_FAST_TERM         qualifiers of the functions
//     Real, Truth            a number and the result of comparing two
//     splat, choose, vmax, vmin, exponential     vmax and vmin return their second argument at a NaN
//
// and an accumulator `sums` with add(name, x), add_square(name, x), count(name, truth) and
// ratio(x, valid). What it adds up are the metrics up to the factors of kSumScale.

struct Constants {
  float lowest_ratio, highest_ratio, dual_clip, log_ratio_clamp, value_clip_eps;
  float policy_slope, kl_slope, entropy_slope, value_slope;
  bool capped, own_kl_gradient;
  KlEstimator kl_estimator;
};

// Settings in fp32, `inverse` = 1 / normalizer folded into the slopes.
inline Constants make_constants(const PpoLossArgs& args, double inverse) {
  Constants c;
  c.lowest_ratio = static_cast<float>(1.0 - args.clip_eps_low);
  c.highest_ratio = static_cast<float>(1.0 + args.clip_eps_high);
  c.dual_clip = static_cast<float>(args.dual_clip);
  c.log_ratio_clamp = static_cast<float>(args.log_ratio_clamp);
  c.value_clip_eps = static_cast<float>(args.value_clip_eps);
  c.policy_slope = static_cast<float>(inverse);
  c.kl_slope = static_cast<float>(args.kl_coef * inverse);
  c.entropy_slope = static_cast<float>(-args.entropy_coef * inverse);
  c.value_slope = static_cast<float>(args.value_coef * inverse);
  c.capped = args.dual_clip < HUGE_VAL;
  c.own_kl_gradient = args.own_kl_gradient;
  c.kl_estimator = args.kl_estimator;
  return c;
}

// NaN passes, as in torch.clamp.
RLHF_FAST_TERM Real clamp(Real x, Real low, Real high) { return vmin(high, vmax(low, x)); }

// Returns the gradient with respect to the log ratio `delta`.
template <class Sums>
RLHF_FAST_TERM Real policy_term(const Constants& c, Real delta, Real advantage, Real weight,
                                Truth valid, Sums& sums) {
  const Real zero = splat(0.0f), half = splat(0.5f), one = splat(1.0f);
  const Real bound = splat(c.log_ratio_clamp);
  const Real clamped = clamp(delta, -bound, bound);
  const Exponential e = exponential(clamped);
  const Real ratio = e.exp;
  const Real banded = clamp(ratio, splat(c.lowest_ratio), splat(c.highest_ratio));
  const Real unclipped = -advantage * ratio, clipped = -advantage * banded;
  const Truth use_clip = clipped > unclipped;
  const Truth negative = advantage < zero;
  Real loss = vmax(clipped, unclipped);
  // Inside the band both are equal and torch gives each one half; outside it, a half is lost at a tie.
  Real share = choose((banded == ratio) | (unclipped > clipped), one,
                      choose(unclipped == clipped, half, zero));
  if (c.capped) {
    const Real cap = choose(negative, -splat(c.dual_clip) * advantage, splat(HUGE_VALF));
    const Truth above = loss > cap;
    share = choose(above, zero, choose(loss == cap, half * share, share));
    loss = vmin(cap, loss);
    sums.count(kClipDual, above);
  }
  const Real slope = unclipped * share * (weight * splat(c.policy_slope));

  sums.add(kPolicyLoss, loss * weight);
  sums.add(kApproxKlK1, delta);
  sums.add_square(kApproxKlK2, delta);
  sums.add(kApproxKlK3, e.exp_minus_1_minus_x);
  sums.count(kClipLow, use_clip & negative);
  sums.count(kClipHigh, use_clip & (advantage > zero));
  sums.ratio(ratio, valid);
  return choose(clamped == delta, slope, slope * zero);  // the clamp passes at its bounds
}

// Returns the gradient with respect to logprobs; `log_ratio` = logprobs - ref_logprobs.
template <class Sums>
RLHF_FAST_TERM Real kl_term(const Constants& c, Real log_ratio, Truth valid, Sums& sums) {
  const Real bound = splat(c.log_ratio_clamp);
  const Real d = clamp(log_ratio, -bound, bound);
  Real estimate = d, own = splat(1.0f);
  if (c.kl_estimator == KlEstimator::k2) {
    estimate = splat(0.5f) * d * d;
    own = d;
  } else if (c.kl_estimator == KlEstimator::k3) {
    const Exponential inverse = exponential(-d);
    estimate = inverse.exp_minus_1_minus_x;
    own = -inverse.exp_minus_1;
  }
  sums.add(kKl, estimate);
  return choose(valid, splat(c.kl_slope) * (c.own_kl_gradient ? own : d), splat(0.0f));
}

// Entropy and exact KL are given per token: added up, with a constant gradient.
template <class Sums>
RLHF_FAST_TERM Real given_term(PpoSum name, float slope, Real x, Truth valid, Sums& sums) {
  sums.add(name, x);
  return choose(valid, splat(slope), splat(0.0f));
}

// Returns the gradient with respect to `value`; `clipping`: around `old`.
template <class Sums>
RLHF_FAST_TERM Real value_term(const Constants& c, Real value, Real old, Real target, bool clipping,
                               Sums& sums) {
  const Real error = value - target, squared = error * error;
  Real worst = squared, gradient = error;
  if (clipping) {
    const Real eps = splat(c.value_clip_eps), moved = value - old;
    const Real banded = clamp(moved, -eps, eps);
    const Real near_error = old + banded - target, near_squared = near_error * near_error;
    const Truth near_wins = near_squared > squared;
    const Real near_gradient = choose(banded == moved, near_error, splat(0.0f));
    gradient = choose(squared > near_squared, error,
                      choose(near_wins, near_gradient, splat(0.5f) * (error + near_gradient)));
    worst = vmax(near_squared, squared);
    // Inside the band near_error is error up to rounding, which must not count as clipped.
    sums.count(kValueClip, near_wins & (banded != moved));
  }
  sums.add(kValueLoss, worst);
  sums.add(kReturns, target);
  sums.add_square(kReturnsSquared, target);
  sums.add(kResidual, error);
  sums.add(kResidualSquared, squared);
  return gradient * splat(c.value_slope);
}

// From what `sums` added up to the metric.
RLHF_FAST_TERM double sum_scale(int name) {
  if (name == kApproxKlK1 || name == kResidual) return -1.0;
  return name == kApproxKlK2 || name == kValueLoss ? 0.5 : 1.0;
}

// `metrics` as they are reported.
RLHF_FAST_TERM double objective(const double* metrics, double value_coef, double kl_coef,
                                double entropy_coef, double normalizer) {
  const double total = metrics[kPolicyLoss] + value_coef * metrics[kValueLoss] +
                       (kl_coef == 0.0 ? 0.0 : kl_coef * metrics[kKl]) -
                       (entropy_coef == 0.0 ? 0.0 : entropy_coef * metrics[kEntropy]);
  // A step without loss tokens has normalizer 0: its sums are exact zeros.
  return normalizer > 0.0 ? total / normalizer : total * 0.0;
}
