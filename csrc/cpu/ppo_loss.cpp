// Tiles of kTile tokens that stay in the first-level cache. Each tile reads its inputs as fp32 with
// masked slots replaced by 0, runs the parts that were asked for, and leaves its sums in a slot of its
// own; the slots are added in tile order in fp64, so nothing depends on the number of threads.
// The formulas, with their ties and clamps, are those of kernels/rlhf_fast_kernels/ppo_loss.py.
#include "cpu/ppo_loss.h"

#include <cmath>
#include <cstdlib>

#include "cpu/vec_math.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kTile = 512;
constexpr int64_t kTilesPerTask = 16;
constexpr int64_t kSingleThreadTokens = 8192;
constexpr int64_t kWaveTiles = 4096;  // bounds the slots in memory: two million tokens

struct TileSums {
  double sums[kPpoSums];
  float highest;
  float highest_negative;
};

// One value per lane and name; kTile / kLanes additions each, then fp64.
struct LaneSums {
  vfloat lanes[kPpoSums];
  vfloat highest = splat(-HUGE_VALF);
  vfloat highest_negative = splat(-HUGE_VALF);

  LaneSums() {
    for (vfloat& v : lanes) v = splat(0.0f);
  }
  inline void add(PpoSum name, vfloat x) { lanes[name] += x; }
  inline void count(PpoSum name, vint which) {
    lanes[name] += select(which, splat(1.0f), splat(0.0f));
  }
};

// One tensor of a tile, padded with zeros to whole vectors, 0 where the mask is false.
struct alignas(64) Column {
  float x[kTile];

  void read(const TokenTensor& tensor, int64_t begin, int64_t count, const int32_t* mask) {
    if (tensor.dtype == DType::f32) {
      const float* source = static_cast<const float*>(tensor.data) + begin;
      for (int64_t i = 0; i < count; ++i) {
        const float value = source[i];
        x[i] = mask[i] != 0 ? value : 0.0f;
      }
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(tensor.data) + begin;
      for (int64_t i = 0; i < count; ++i) {
        const float value = bf16_to_float(source[i]);
        x[i] = mask[i] != 0 ? value : 0.0f;
      }
    }
    for (int64_t i = count; i < kTile && i % kLanes != 0; ++i) x[i] = 0.0f;
  }
};

struct alignas(64) Mask {
  int32_t bits[kTile];  // 0 or -1

  void read(const uint8_t* source, int64_t count) {
    for (int64_t i = 0; i < count; ++i) bits[i] = source[i] != 0 ? -1 : 0;
    for (int64_t i = count; i < kTile && i % kLanes != 0; ++i) bits[i] = 0;
  }
  inline vint at(int64_t i) const {
    vint value;
    std::memcpy(&value, bits + i, sizeof(value));
    return value;
  }
};

// fp32 copies of the settings, with 1 / normalizer folded into the slopes.
struct Constants {
  float lowest_ratio, highest_ratio, dual_clip, log_ratio_clamp, value_clip_eps;
  float policy_slope, kl_slope, entropy_slope, value_slope;

  explicit Constants(const PpoLossArgs& args) {
    // A step without loss tokens has normalizer 0: its loss and gradients are 0.
    const double inverse = args.normalizer > 0.0 ? 1.0 / args.normalizer : 0.0;
    lowest_ratio = static_cast<float>(1.0 - args.clip_eps_low);
    highest_ratio = static_cast<float>(1.0 + args.clip_eps_high);
    dual_clip = static_cast<float>(args.dual_clip);
    log_ratio_clamp = static_cast<float>(args.log_ratio_clamp);
    value_clip_eps = static_cast<float>(args.value_clip_eps);
    policy_slope = static_cast<float>(inverse);
    kl_slope = static_cast<float>(args.kl_coef * inverse);
    entropy_slope = static_cast<float>(-args.entropy_coef * inverse);
    value_slope = static_cast<float>(args.value_coef * inverse);
  }
};

// NaN passes, as in torch.clamp.
inline vfloat clamp(vfloat x, vfloat low, vfloat high) { return vmin(high, vmax(low, x)); }

inline vint magnitude_within(vfloat x, vfloat bound) { return (x >= -bound) & (x <= bound); }

// 1 where a wins a max, 1/2 at a tie, 0 where it loses: torch's gradient of maximum(a, b).
inline vfloat share_of_max(vfloat a, vfloat b) {
  return select(a > b, splat(1.0f), select(a == b, splat(0.5f), splat(0.0f)));
}

struct Tile {
  const PpoLossArgs& args;
  const Constants& constants;
  int64_t begin;
  int64_t count;
  Mask mask;
  Column logprobs, entropy, values, exact_kl;  // kept for the parts that follow
  Column d_logprobs;
  LaneSums acc;

  Tile(const PpoLossArgs& a, const Constants& c, int64_t first, int64_t length)
      : args(a), constants(c), begin(first), count(length) {
    mask.read(args.mask + begin, count);
  }

  void policy() {
    Column old_logprobs, advantages, weights;
    logprobs.read(args.logprobs, begin, count, mask.bits);
    old_logprobs.read(args.old_logprobs, begin, count, mask.bits);
    advantages.read(args.advantages, begin, count, mask.bits);
    const bool weighted = args.weights.data != nullptr;
    if (weighted) weights.read(args.weights, begin, count, mask.bits);
    for (int64_t i = 0; i < count; i += kLanes) {
      const vfloat weight = weighted ? load(weights.x + i) : splat(1.0f);
      store(d_logprobs.x + i, policy_at(load(logprobs.x + i) - load(old_logprobs.x + i),
                                        load(advantages.x + i), weight, mask.at(i)));
    }
  }

  // Adds to the sums; returns the gradient with respect to the log ratio `delta`.
  inline vfloat policy_at(vfloat delta, vfloat advantage, vfloat weight, vint valid) {
    const vfloat bound = splat(constants.log_ratio_clamp);
    const vfloat clamped = clamp(delta, -bound, bound);
    const Exponential e = exponential(clamped);
    const vfloat ratio = e.exp;
    const vfloat low = splat(constants.lowest_ratio), high = splat(constants.highest_ratio);
    const vfloat unclipped = -advantage * ratio;
    const vfloat clipped = -advantage * clamp(ratio, low, high);
    const vint use_clip = clipped > unclipped;
    vfloat loss = vmax(clipped, unclipped);
    const vint inside = (ratio >= low) & (ratio <= high);
    vfloat share = share_of_max(unclipped, clipped) +
                   select(inside, share_of_max(clipped, unclipped), splat(0.0f));
    const vint negative = advantage < splat(0.0f);
    const vfloat cap =
        select(negative, -splat(constants.dual_clip) * advantage, splat(HUGE_VALF));
    const vint capped = loss > cap;
    share *= select(capped, splat(0.0f), select(loss == cap, splat(0.5f), splat(1.0f)));
    loss = vmin(cap, loss);
    const vfloat slope = unclipped * share * weight * splat(constants.policy_slope);

    acc.add(kPolicyLoss, loss * weight);
    acc.add(kApproxKlK1, -delta);
    acc.add(kApproxKlK2, splat(0.5f) * delta * delta);
    acc.add(kApproxKlK3, e.exp_minus_1_minus_x);
    acc.add(kRatio, select(valid, ratio, splat(0.0f)));
    acc.add(kRatioSquared, select(valid, ratio * ratio, splat(0.0f)));
    acc.count(kClipLow, use_clip & negative);
    acc.count(kClipHigh, use_clip & (advantage > splat(0.0f)));
    acc.count(kClipDual, capped);
    acc.count(kTokens, valid);
    acc.highest = vmax(select(valid, ratio, splat(-HUGE_VALF)), acc.highest);
    acc.highest_negative = vmax(select(valid, -ratio, splat(-HUGE_VALF)), acc.highest_negative);
    return select(magnitude_within(delta, bound), slope, slope * splat(0.0f));
  }

  void kl() {
    Column ref_logprobs;
    ref_logprobs.read(args.ref_logprobs, begin, count, mask.bits);
    const vfloat bound = splat(constants.log_ratio_clamp);
    const vfloat slope = splat(constants.kl_slope);
    for (int64_t i = 0; i < count; i += kLanes) {
      const vfloat d = clamp(load(logprobs.x + i) - load(ref_logprobs.x + i), -bound, bound);
      const Exponential inverse = exponential(-d);
      vfloat estimate = d, own = splat(1.0f);
      if (args.kl_estimator == KlEstimator::k2) {
        estimate = splat(0.5f) * d * d;
        own = d;
      } else if (args.kl_estimator == KlEstimator::k3) {
        estimate = inverse.exp_minus_1_minus_x;
        own = -inverse.exp_minus_1;
      }
      acc.add(kKl, estimate);
      const vfloat gradient = slope * (args.own_kl_gradient ? own : d);
      store(d_logprobs.x + i,
            load(d_logprobs.x + i) + select(mask.at(i), gradient, splat(0.0f)));
    }
  }

  // A term that is given per token; leaves its gradient in `column`.
  void linear(PpoSum name, const TokenTensor& tensor, float slope, Column& column) {
    column.read(tensor, begin, count, mask.bits);
    for (int64_t i = 0; i < count; i += kLanes) {
      acc.add(name, load(column.x + i));
      store(column.x + i, select(mask.at(i), splat(slope), splat(0.0f)));
    }
  }

  void value() {
    Column old_values, returns;
    values.read(args.values, begin, count, mask.bits);
    returns.read(args.returns, begin, count, mask.bits);
    const bool clipping = args.old_values.data != nullptr;
    if (clipping) old_values.read(args.old_values, begin, count, mask.bits);
    const vfloat eps = splat(constants.value_clip_eps);
    for (int64_t i = 0; i < count; i += kLanes) {
      const vfloat target = load(returns.x + i), v = load(values.x + i);
      const vfloat error = v - target, squared = error * error;
      vfloat worst = squared, gradient = error;
      if (clipping) {
        const vfloat old = load(old_values.x + i), moved = v - old;
        const vfloat near_error = old + clamp(moved, -eps, eps) - target;
        const vfloat near_squared = near_error * near_error;
        const vint inside = magnitude_within(moved, eps);
        gradient = error * share_of_max(squared, near_squared) +
                   select(inside, near_error * share_of_max(near_squared, squared), splat(0.0f));
        worst = vmax(near_squared, squared);
        acc.count(kValueClip, (near_squared > squared) & ~inside);
      }
      acc.add(kValueLoss, splat(0.5f) * worst);
      acc.add(kReturns, target);
      acc.add(kReturnsSquared, target * target);
      acc.add(kResidual, -error);
      acc.add(kResidualSquared, squared);
      acc.count(kValueTokens, mask.at(i));
      store(values.x + i, gradient * splat(constants.value_slope));
    }
  }

  void write(float* out, const Column& column) const {
    if (out != nullptr) {
      std::memcpy(out + begin, column.x, static_cast<size_t>(count) * sizeof(float));
    }
  }

  void finish(TileSums& out) const {
    for (int name = 0; name < kPpoSums; ++name) out.sums[name] = add_lanes(acc.lanes[name]);
    out.highest = max_lanes(acc.highest);
    out.highest_negative = max_lanes(acc.highest_negative);
  }
};

void run_tile(const PpoLossArgs& args, const Constants& constants, int64_t tile, TileSums& out) {
  const int64_t begin = tile * kTile;
  Tile work(args, constants, begin, smaller(kTile, args.tokens - begin));
  if (args.logprobs.data != nullptr) {
    work.policy();
    if (args.ref_logprobs.data != nullptr) work.kl();
    work.write(args.d_logprobs, work.d_logprobs);
  }
  if (args.entropy.data != nullptr) {
    work.linear(kEntropy, args.entropy, constants.entropy_slope, work.entropy);
    work.write(args.d_entropy, work.entropy);
  }
  if (args.kl.data != nullptr) {
    work.linear(kKl, args.kl, constants.kl_slope, work.exact_kl);
    work.write(args.d_kl, work.exact_kl);
  }
  if (args.values.data != nullptr) {
    work.value();
    work.write(args.d_values, work.values);
  }
  work.finish(out);
}

void add_tile(TileSums& total, const TileSums& tile) {
  for (int name = 0; name < kPpoSums; ++name) total.sums[name] += tile.sums[name];
  if (tile.highest > total.highest) total.highest = tile.highest;
  if (tile.highest_negative > total.highest_negative) {
    total.highest_negative = tile.highest_negative;
  }
}

void write_results(const PpoLossArgs& args, const TileSums& total) {
  const double objective =
      total.sums[kPolicyLoss] + args.value_coef * total.sums[kValueLoss] +
      (args.kl_coef == 0.0 ? 0.0 : args.kl_coef * total.sums[kKl]) -
      (args.entropy_coef == 0.0 ? 0.0 : args.entropy_coef * total.sums[kEntropy]);
  *args.loss = static_cast<float>(args.normalizer > 0.0 ? objective / args.normalizer
                                                        : objective * 0.0);
  for (int name = 0; name < kPpoSums; ++name) {
    args.sums[name] = static_cast<float>(total.sums[name]);
  }
  args.extrema[0] = total.highest;
  args.extrema[1] = total.highest_negative;
}

}  // namespace

void ppo_loss(const PpoLossArgs& args) {
  const Constants constants(args);
  const int64_t tiles = (args.tokens + kTile - 1) / kTile;
  const int64_t slots = smaller(tiles, kWaveTiles);
  TileSums total{{}, -HUGE_VALF, -HUGE_VALF};
  TileSums only;  // without memory for slots, one tile after the other: the same order of additions
  TileSums* slot = static_cast<TileSums*>(std::malloc(static_cast<size_t>(slots) * sizeof(only)));
  const int64_t wave = slot == nullptr ? 1 : larger(slots, 1);
  const int threads = args.tokens <= kSingleThreadTokens ? 1 : args.threads;
  for (int64_t first = 0; first < tiles; first += wave) {
    const int64_t length = smaller(wave, tiles - first);
    TileSums* out = slot == nullptr ? &only : slot;
    parallel_for(length, kTilesPerTask, threads, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        run_tile(args, constants, first + tile, out[tile]);
      }
    });
    for (int64_t tile = 0; tile < length; ++tile) add_tile(total, out[tile]);
  }
  std::free(slot);
  write_results(args, total);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
