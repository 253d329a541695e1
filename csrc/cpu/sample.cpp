// Sampling: what is kept of a row, and the race among it. The sweeps are in cpu/sample_sweeps.h.
#include "cpu/sample.h"

#include <cmath>

#include "cpu/sample_sweeps.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kSmallestScale = 0x1p-126f;  // -inf times it is still -inf
constexpr float kLargestScale = 0x1p127f;    // 0 times it is still 0

// ---- fp32 as integers of the same order ---------------------------------------------------------

int64_t order_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

float value_of(int64_t order) {
  int32_t bits = static_cast<int32_t>(order);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// bf16 has the upper half of these integers; the lower half is constant for each sign.
template <class Type>
constexpr int kShift = sizeof(typename Type::Element) == 2 ? 16 : 0;

template <class Type>
float value_of_key(int64_t key) {
  const int64_t low = (int64_t{1} << kShift<Type>) - 1;
  return value_of((key << kShift<Type>) | (key < 0 ? low : 0));
}

template <class Type>
int64_t key_of(float x) {
  return order_of(x) >> kShift<Type>;
}

// ---- sweeps over all segments -------------------------------------------------------------------

// body(index, begin, end) for each segment of ids; on several threads unless rows are in parallel.
template <class Type, class Body>
int64_t for_segments(const Row<Type>& row, int threads, const Body& body) {
  const int64_t length = row.segment_length();
  const int64_t segments = (row.vocab + length - 1) / length;
  parallel_for(segments, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      body(s, s * length, smaller(row.vocab, (s + 1) * length));
    }
  });
  return segments;
}

template <class Type>
float maximum(const Row<Type>& row, int threads) {
  float part[kMaxSegments];
  const int64_t segments =
      for_segments(row, threads, [&](int64_t s, int64_t begin, int64_t end) {
        part[s] = max_of<Type>(row.x + begin, end - begin);
      });
  float best = -HUGE_VALF;
  for (int64_t s = 0; s < segments; ++s) best = part[s] > best ? part[s] : best;
  return best;
}

template <class Type, bool kFiltered>
Sums sums_of(const Row<Type>& row, bool racing, int threads) {
  Sums part[kMaxSegments];
  const int64_t segments =
      for_segments(row, threads, [&](int64_t s, int64_t begin, int64_t end) {
        part[s] = sweep<Type, kFiltered>(row, begin, end, racing);
      });
  Sums total;
  for (int64_t s = 0; s < segments; ++s) total.add(part[s]);
  return total;
}

template <class Type, bool kMass>
void all_above(const Row<Type>& row, const float* thresholds, double* sums, int threads) {
  double part[kMaxSegments][kThresholds];
  const int64_t segments =
      for_segments(row, threads, [&](int64_t s, int64_t begin, int64_t end) {
        sum_above<Type, kMass>(row, begin, end, thresholds, part[s]);
      });
  for (int j = 0; j < kThresholds; ++j) {
    sums[j] = 0.0;
    for (int64_t s = 0; s < segments; ++s) sums[j] += part[s][j];
  }
}

// ---- filters ------------------------------------------------------------------------------------

// The smallest value t above which lies less than `target`, and `above`, how much that is. Each sweep
// quarters the interval of keys; `below` is known to be too low. A count that meets the target ends
// the search: then exactly what lies above t belongs.
template <class Type, bool kMass>
float border(const Row<Type>& row, int64_t below, double target, double& above, int threads) {
  int64_t high = key_of<Type>(row.best);
  above = 0.0;
  while (high - below > 1) {
    int64_t keys[kThresholds];
    float thresholds[kThresholds];
    for (int j = 0; j < kThresholds; ++j) {
      keys[j] = below + (high - below) * (j + 1) / (kThresholds + 1);
      thresholds[j] = value_of_key<Type>(keys[j]);
    }
    double sums[kThresholds];
    all_above<Type, kMass>(row, thresholds, sums, threads);
    for (int j = kThresholds - 1; j >= 0; --j) {
      if (keys[j] <= below || keys[j] >= high) continue;
      if (!kMass && sums[j] == target) {
        above = target;
        return thresholds[j];
      }
      if (sums[j] < target) {
        high = keys[j];
        above = sums[j];
      } else {
        below = keys[j];
      }
    }
  }
  return value_of_key<Type>(high);
}

// The id of the `room`-th entry that equals the threshold, in order of ids; -1 if there is no room.
template <class Type>
int64_t tie_limit(const Row<Type>& row, double room) {
  if (room == 0.0) return -1;
  int64_t left = room < static_cast<double>(row.vocab) ? static_cast<int64_t>(room) : row.vocab;
  for (int64_t begin = 0; begin < row.vocab; begin += kGroup) {
    const int64_t end = smaller(row.vocab, begin + kGroup);
    int32_t ties = 0;
    for (int64_t i = begin; i < end; ++i) ties += Type::get(row.x + i) == row.threshold;
    if (ties < left) {
      left -= ties;
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (Type::get(row.x + i) == row.threshold && --left == 0) return i;
    }
  }
  return row.vocab;  // fewer ties than there is room for
}

// Top-k leaves a prefix of the tokens ordered by (logit, then lower id), top-p a prefix of that: the
// border of either is a value and how many of the entries that equal it still belong.
template <class Type>
void set_filters(Row<Type>& row, int64_t top_k, double top_p, double mass, int threads) {
  double room = HUGE_VAL;
  int64_t below = key_of<Type>(-HUGE_VALF) - 1;
  if (top_k > 0 && top_k < row.vocab) {
    double above;
    row.threshold = border<Type, false>(row, below, static_cast<double>(top_k), above, threads);
    room = static_cast<double>(top_k) - above;
    below = key_of<Type>(row.threshold) - 1;
    if (top_p < 1.0) {
      const float t[kThresholds] = {row.threshold, row.threshold, row.threshold};
      double sums[kThresholds];
      all_above<Type, true>(row, t, sums, threads);
      const double y = (static_cast<double>(row.threshold) - row.best) * row.scale;
      mass = sums[0] + room * std::exp2(y);
    }
  }
  if (top_p < 1.0) {
    // All tokens below a V-th of 1 - top_p, halved for safety, together cannot fill the gap.
    const double lowest = std::log2((1.0 - top_p) * mass / static_cast<double>(row.vocab)) - 1.0;
    const float bound = static_cast<float>(row.best + lowest / row.scale);
    below = larger(below, key_of<Type>(bound) - 1);
    double above;
    const float threshold = border<Type, true>(row, below, top_p * mass, above, threads);
    const double y = (static_cast<double>(threshold) - row.best) * row.scale;
    double fit = std::ceil((top_p * mass - above) / std::exp2(y));  // infinite for ties at -inf
    if (fit < 1.0) fit = 1.0;
    room = threshold > row.threshold || fit < room ? fit : room;
    row.threshold = threshold;
  }
  row.last_tie = tie_limit(row, room);
}

// ---- one row ------------------------------------------------------------------------------------

struct Drawn {
  int64_t token = -1;
  double logprob = NAN;
  double raw_logprob = NAN;
  double entropy = NAN;
};

template <class Type>
Drawn draw(Row<Type>& row, const SampleArgs& args, int64_t index, int threads) {
  const int64_t top_k = args.top_k[index];
  const double top_p = args.top_p[index], min_p = args.min_p[index];
  const bool greedy = args.temperature[index] == 0.0f || top_k == 1 || top_p == 0.0;
  const bool filtered =
      !greedy && ((top_k > 0 && top_k < row.vocab) || top_p < 1.0 || min_p > 0.0);
  Drawn drawn;
  row.best = maximum(row, threads);
  if (!(std::fabs(row.best) < HUGE_VALF)) return drawn;
  const Sums all = sums_of<Type, false>(row, !greedy && !filtered, threads);
  if (all.mass != all.mass) return drawn;
  const double log2_mass = std::log2(all.mass);
  double log2_kept = log2_mass;
  if (greedy) {
    drawn.token = 0;
    while (Type::get(row.x + drawn.token) != row.best) ++drawn.token;
    log2_kept = row.log2_p(drawn.token);
  } else if (filtered) {
    set_filters(row, top_k, top_p, all.mass, threads);
    row.lowest = static_cast<float>(std::log2(min_p));
    const Sums kept = sums_of<Type, true>(row, true, threads);
    drawn.token = kept.leader.id;
    log2_kept = std::log2(kept.mass);
  } else {
    drawn.token = all.leader.id;
  }
  const double log2_p = row.log2_p(drawn.token);
  drawn.logprob = (log2_p - log2_kept) * kLn2;
  drawn.raw_logprob = (log2_p - log2_mass) * kLn2;
  drawn.entropy = (log2_mass - all.weighted / all.mass) * kLn2;
  return drawn;
}

template <class Type>
void sample_row(const SampleArgs& args, int64_t index, int threads) {
  const float temperature = args.temperature[index] == 0.0f ? 1.0f : args.temperature[index];
  double scale = kLog2E / static_cast<double>(temperature);
  if (scale < kSmallestScale) scale = kSmallestScale;
  if (scale > kLargestScale) scale = kLargestScale;
  Row<Type> row{static_cast<const typename Type::Element*>(args.logits) + index * args.row_stride,
                args.vocab, scale,
                Philox(static_cast<uint64_t>(args.seeds[index]),
                       static_cast<uint64_t>(args.steps[index]))};
  const Drawn drawn = draw(row, args, index, threads);
  args.tokens[index] = drawn.token;
  args.logprobs[index] = static_cast<float>(drawn.logprob);
  args.raw_logprobs[index] = static_cast<float>(drawn.raw_logprob);
  if (args.entropy != nullptr) args.entropy[index] = static_cast<float>(drawn.entropy);
}

// Many rows: a row is a task. Few: the segments of each are.
template <class Type>
void sample_rows(const SampleArgs& args) {
  if (args.rows >= 4 * static_cast<int64_t>(args.threads)) {
    parallel_for(args.rows, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) sample_row<Type>(args, index, 1);
    });
    return;
  }
  for (int64_t index = 0; index < args.rows; ++index) sample_row<Type>(args, index, args.threads);
}

}  // namespace

void sample(const SampleArgs& args) {
  if (args.dtype == DType::f32) return sample_rows<Float32>(args);
  sample_rows<BFloat16>(args);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
