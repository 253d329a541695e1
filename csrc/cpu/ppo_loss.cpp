// Tiles of kTile tokens, each read once: a vector of tokens goes through all parts while it is in
// registers. The sums of a tile are kept per lane in fp32 and added in fp64 at its end, into a slot of the
// tile's own; the slots are added in tile order, so nothing depends on the number of threads.
#include "cpu/ppo_loss.h"

#include <cmath>
#include <cstdlib>

#include "cpu/vec_math.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

#define RLHF_FAST_TERM inline
typedef vfloat Real;
typedef vint Truth;
inline Real choose(Truth which, Real yes, Real no) { return which ? yes : no; }
#include "cpu/ppo_loss_terms.h"

constexpr int64_t kTile = 1024;
constexpr int64_t kTilesPerTask = 8;
constexpr int64_t kSingleThreadTokens = 8192;
constexpr int64_t kWaveTiles = 2048;  // bounds the slots in memory: two million tokens

struct TileSums {
  double sums[kPpoSums];
  float highest;
  float lowest;
};

// One value per lane and name; kTile / kLanes additions each, then fp64.
struct LaneSums {
  vfloat lanes[kPpoSums];
  vint counts[kPpoSums];
  vfloat highest = splat(0.0f);  // ratios are positive; without a token neither is looked at
  vfloat lowest = splat(HUGE_VALF);

  LaneSums() {
    for (vfloat& v : lanes) v = splat(0.0f);
    for (vint& v : counts) v = vint{};
  }
  inline void add(PpoSum name, vfloat x) { lanes[name] += x; }
  inline void add_square(PpoSum name, vfloat x) { lanes[name] = fma(x, x, lanes[name]); }
  inline void count(PpoSum name, vint which) { counts[name] -= which; }
  inline void ratio(vfloat x, vint valid) {
    const vfloat kept = choose(valid, x, splat(0.0f));
    add(kRatio, kept);
    add_square(kRatioSquared, kept);
    highest = vmax(kept, highest);
    lowest = vmin(choose(valid, x, splat(HUGE_VALF)), lowest);
    count(kTokens, valid);
  }
};

typedef int8_t byte_lanes __attribute__((vector_size(kLanes)));
typedef uint16_t half_lanes __attribute__((vector_size(kLanes * 2)));

inline vint load_mask(const uint8_t* address) {
  byte_lanes bytes;
  std::memcpy(&bytes, address, sizeof(bytes));
  return __builtin_convertvector(bytes != 0, vint);
}

inline vfloat load_tokens(const TokenTensor& tensor, int64_t i) {
  if (tensor.dtype == DType::f32) return load(static_cast<const float*>(tensor.data) + i);
  half_lanes halves;
  std::memcpy(&halves, static_cast<const uint16_t*>(tensor.data) + i, sizeof(halves));
  return from_bits(__builtin_convertvector(halves, vint) << 16);
}

inline void write(float* out, int64_t i, vfloat x) {
  if (out != nullptr) store(out + i, x);
}

// Tokens begin .. begin + count, whole vectors.
void run_vectors(const PpoLossArgs& args, const Constants& c, int64_t begin, int64_t count,
                 LaneSums& sums) {
  const bool clipping = args.old_values.data != nullptr;
  for (int64_t i = begin; i < begin + count; i += kLanes) {
    const vint valid = load_mask(args.mask + i);
    const auto read = [&](const TokenTensor& tensor) {
      return choose(valid, load_tokens(tensor, i), splat(0.0f));
    };
    if (args.logprobs.data != nullptr) {
      const vfloat logprobs = read(args.logprobs);
      const vfloat weight = args.weights.data != nullptr ? read(args.weights) : splat(1.0f);
      vfloat slope = policy_term(c, logprobs - read(args.old_logprobs), read(args.advantages),
                                 weight, valid, sums);
      if (args.ref_logprobs.data != nullptr) {
        slope += kl_term(c, logprobs - read(args.ref_logprobs), valid, sums);
      }
      write(args.d_logprobs, i, slope);
    }
    if (args.entropy.data != nullptr) {
      write(args.d_entropy, i,
            given_term(kEntropy, c.entropy_slope, read(args.entropy), valid, sums));
    }
    if (args.kl.data != nullptr) {
      write(args.d_kl, i, given_term(kKl, c.kl_slope, read(args.kl), valid, sums));
    }
    if (args.values.data != nullptr) {
      const vfloat old = clipping ? read(args.old_values) : splat(0.0f);
      write(args.d_values, i,
            value_term(c, read(args.values), old, read(args.returns), clipping, sums));
      sums.count(kValueTokens, valid);
    }
  }
}

// The last tokens, fewer than a vector, in buffers of a whole one.
class Tail {
 public:
  Tail(const PpoLossArgs& args, int64_t begin, int64_t count) : padded_(args), count_(count) {
    std::memcpy(mask_, args.mask + begin, static_cast<size_t>(count));
    padded_.mask = mask_;
    TokenTensor* tensors[] = {&padded_.logprobs,     &padded_.old_logprobs, &padded_.advantages,
                              &padded_.entropy,      &padded_.ref_logprobs, &padded_.weights,
                              &padded_.values,       &padded_.old_values,   &padded_.returns,
                              &padded_.kl};
    for (int k = 0; k < kTensors; ++k) {
      if (tensors[k]->data == nullptr) continue;
      const int64_t size = tensors[k]->dtype == DType::f32 ? 4 : 2;
      std::memcpy(inputs_[k], static_cast<const char*>(tensors[k]->data) + begin * size,
                  static_cast<size_t>(count * size));
      tensors[k]->data = inputs_[k];
    }
    float** outputs[] = {&padded_.d_logprobs, &padded_.d_entropy, &padded_.d_values, &padded_.d_kl};
    for (int k = 0; k < kOutputs; ++k) {
      destinations_[k] = *outputs[k] == nullptr ? nullptr : *outputs[k] + begin;
      if (*outputs[k] != nullptr) *outputs[k] = results_[k];
    }
  }

  const PpoLossArgs& padded() const { return padded_; }

  void copy_back() const {
    for (int k = 0; k < kOutputs; ++k) {
      if (destinations_[k] == nullptr) continue;
      std::memcpy(destinations_[k], results_[k], static_cast<size_t>(count_) * sizeof(float));
    }
  }

 private:
  static constexpr int kTensors = 10, kOutputs = 4;
  PpoLossArgs padded_;
  int64_t count_;
  uint8_t mask_[kLanes] = {};
  float inputs_[kTensors][kLanes] = {};
  float results_[kOutputs][kLanes];
  float* destinations_[kOutputs];
};

void run_tile(const PpoLossArgs& args, const Constants& constants, int64_t tile, TileSums& out) {
  const int64_t begin = tile * kTile, count = smaller(kTile, args.tokens - begin);
  const int64_t whole = count / kLanes * kLanes;
  LaneSums sums;
  run_vectors(args, constants, begin, whole, sums);
  if (whole < count) {
    Tail tail(args, begin + whole, count - whole);
    run_vectors(tail.padded(), constants, 0, kLanes, sums);
    tail.copy_back();
  }
  for (int name = 0; name < kPpoSums; ++name) {
    int64_t counted = 0;
    for (int lane = 0; lane < kLanes; ++lane) counted += sums.counts[name][lane];
    out.sums[name] = add_lanes(sums.lanes[name]) + static_cast<double>(counted);
  }
  out.highest = max_lanes(sums.highest);
  out.lowest = -max_lanes(-sums.lowest);
}

void add_tile(TileSums& total, const TileSums& tile) {
  for (int name = 0; name < kPpoSums; ++name) total.sums[name] += tile.sums[name];
  if (tile.highest > total.highest) total.highest = tile.highest;
  if (tile.lowest < total.lowest) total.lowest = tile.lowest;
}

void write_results(const PpoLossArgs& args, const TileSums& total) {
  double metrics[kPpoSums];
  for (int name = 0; name < kPpoSums; ++name) {
    metrics[name] = 0.0 + sum_scale(name) * total.sums[name];  // no -0
    args.sums[name] = static_cast<float>(metrics[name]);
  }
  *args.loss = static_cast<float>(objective(metrics, args.value_coef, args.kl_coef,
                                            args.entropy_coef, args.normalizer));
  const bool any = total.sums[kTokens] > 0.0;
  args.extrema[0] = any ? total.highest : -HUGE_VALF;
  args.extrema[1] = any ? -total.lowest : -HUGE_VALF;
}

}  // namespace

void ppo_loss(const PpoLossArgs& args) {
  const Constants constants =
      make_constants(args, args.normalizer > 0.0 ? 1.0 / args.normalizer : 0.0);
  const int64_t tiles = (args.tokens + kTile - 1) / kTile;
  const int64_t slots = smaller(tiles, kWaveTiles);
  TileSums total{{}, 0.0f, HUGE_VALF};
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
