// Log-prob, entropy and their gradient of rows of logits; the sums are in cpu/logit_sums.h.
#include "cpu/logprobs_from_logits.h"

#include <cmath>
#include <cstdlib>

#include "cpu/logit_sums.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kElementsPerTask = 65536;    // about 5 us: well above the cost of a task
constexpr int64_t kStreamFromBytes = 8 << 20;  // a gradient that will not stay in the caches anyway
constexpr double kLn2 = 0.6931471805599453;

// ---- forward ----------------------------------------------------------------------------------

// The arguments of one row, with the scale exactly as the vector code uses it.
template <class Type>
struct Row {
  const typename Type::Element* x;
  int64_t label;
  bool ignored;
  double inverse_temperature;
  float scale;  // log2(e) / temperature

  Row(const LogitRows& rows, int64_t index) {
    x = static_cast<const typename Type::Element*>(rows.logits) +
        index / rows.inner * rows.outer_stride + index % rows.inner * rows.inner_stride;
    label = rows.labels[index];
    ignored = label == rows.ignore_index;
    inverse_temperature =
        1.0 / (rows.temperature == nullptr ? rows.scalar_temperature
                                           : static_cast<double>(rows.temperature[index]));
    scale = static_cast<float>(inverse_temperature * kLog2E);
  }

  bool label_in(int64_t begin, int64_t end) const { return label >= begin && label < end; }
};

template <class Type>
void finish_row(const LogprobsForwardArgs& args, int64_t index, const Stats& stats) {
  const Row<Type> row(args.rows, index);
  const double log2_sum = std::log2(stats.sum);
  const double lse = static_cast<double>(stats.shift) + log2_sum;
  const double y = row.label_in(0, args.rows.vocab)
                       ? static_cast<double>(Type::get(row.x + row.label)) * row.scale
                       : NAN;
  args.logprobs[index] = static_cast<float>((y - lse) * kLn2);
  args.lse[index] = lse * kLn2;
  if (args.entropy != nullptr) {
    args.entropy[index] = static_cast<float>((log2_sum - stats.weighted / stats.sum) * kLn2);
  }
}

// Writes the zeros of an ignored row; false for any other.
bool skip_row(const LogprobsForwardArgs& args, int64_t index) {
  if (args.rows.labels[index] != args.rows.ignore_index) return false;
  args.logprobs[index] = 0.0f;
  args.lse[index] = 0.0;
  if (args.entropy != nullptr) args.entropy[index] = 0.0f;
  return true;
}

int64_t segments_of(const LogitRows& rows) { return (rows.vocab + kSegment - 1) / kSegment; }

template <class Type, bool kEntropy>
Stats stats_of(const LogitRows& rows, int64_t index, int64_t segment) {
  const Row<Type> row(rows, index);
  const int64_t begin = segment * kSegment;
  return segment_stats<Type, kEntropy>(row.x + begin, smaller(kSegment, rows.vocab - begin),
                                       row.scale);
}

template <class Type, bool kEntropy>
void forward_by_rows(const LogprobsForwardArgs& args) {
  const LogitRows& rows = args.rows;
  const int64_t segments = segments_of(rows);
  const int64_t grain = larger(1, kElementsPerTask / larger(rows.vocab, 1));
  parallel_for(rows.outer * rows.inner, grain, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (skip_row(args, index)) continue;
      Stats total;
      for (int64_t segment = 0; segment < segments; ++segment) {
        merge(total, stats_of<Type, kEntropy>(rows, index, segment));
      }
      finish_row<Type>(args, index, total);
    }
  });
}

// Fewer rows than would keep the threads busy: the segments are the tasks. False without memory.
template <class Type, bool kEntropy>
bool forward_by_segments(const LogprobsForwardArgs& args) {
  const LogitRows& rows = args.rows;
  const int64_t count = rows.outer * rows.inner;
  const int64_t segments = segments_of(rows);
  Stats* partial = static_cast<Stats*>(
      std::malloc(static_cast<size_t>(count * segments) * sizeof(Stats)));
  if (partial == nullptr) return false;
  parallel_for(count * segments, 1, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / segments;
      if (rows.labels[index] == rows.ignore_index) continue;
      partial[task] = stats_of<Type, kEntropy>(rows, index, task % segments);
    }
  });
  for (int64_t index = 0; index < count; ++index) {
    if (skip_row(args, index)) continue;
    Stats total;
    for (int64_t segment = 0; segment < segments; ++segment) {
      merge(total, partial[index * segments + segment]);
    }
    finish_row<Type>(args, index, total);
  }
  std::free(partial);
  return true;
}

template <class Type, bool kEntropy>
void forward(const LogprobsForwardArgs& args) {
  const LogitRows& rows = args.rows;
  const bool few = rows.outer * rows.inner < 4 * static_cast<int64_t>(rows.threads);
  if (rows.threads > 1 && few && segments_of(rows) > 1 &&
      forward_by_segments<Type, kEntropy>(args)) {
    return;
  }
  forward_by_rows<Type, kEntropy>(args);
}

// ---- backward ---------------------------------------------------------------------------------

// With t = y - shift and p = 2^t * correction: the gradient of an entry is 2^t (a + b t), and the
// label's own is computed apart, in fp64.
template <class Type>
struct RowGradient {
  float shift;
  float a;
  float b;
  double at_label;
  bool zero;

  RowGradient(const LogprobsBackwardArgs& args, const Row<Type>& row, int64_t index) {
    const double g = args.grad_logprobs == nullptr ? 0.0 : args.grad_logprobs[index];
    const double h = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[index];
    zero = row.ignored || (g == 0.0 && h == 0.0);
    shift = a = b = 0.0f;
    at_label = 0.0;
    if (zero) return;
    const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[index];
    const double lse = args.lse[index] * kLog2E;
    shift = static_cast<float>(lse);
    const double rest = static_cast<double>(shift) - lse;
    const double correction = std::exp2(rest) * row.inverse_temperature;
    a = static_cast<float>(-(g + h * (entropy + kLn2 * rest)) * correction);
    b = static_cast<float>(-h * kLn2 * correction);
    if (!row.label_in(0, args.rows.vocab)) {
      a = b = NAN;
      return;
    }
    const double log2_p = static_cast<double>(Type::get(row.x + row.label)) * row.scale - lse;
    const double p = std::exp2(log2_p);
    const double from_entropy = p == 0.0 ? 0.0 : h * p * (log2_p * kLn2 + entropy);
    at_label = (g * (1.0 - p) - from_entropy) * row.inverse_temperature;
  }
};

struct Slope {
  vfloat scale, minus_shift, a, b;

  inline vfloat at(vfloat x) const {
    const vfloat t = fma(x, scale, minus_shift);
    const vfloat clamped = vmax(splat(kLowestExponent), t);
    const vfloat value = exp2_normal(clamped) * fma(b, clamped, a);
    return select(t < splat(kLowestExponent), splat(0.0f), value);  // exact 0 at -inf
  }
};

template <class Type>
inline vint gradient_bits(const typename Type::Element* x, const Slope& slope) {
  vfloat value[Type::kVectors];
  Type::read(x, value);
  for (vfloat& v : value) v = slope.at(v);
  return Type::pack(value);
}

// `count` < one vector.
template <class Type>
void partial_gradient(const typename Type::Element* x, typename Type::Element* out, int64_t count,
                      const Slope& slope) {
  typename Type::Element padded[Type::kPerVector];
  for (int64_t j = 0; j < Type::kPerVector; ++j) padded[j] = j < count ? x[j] : Type::lowest();
  const vint bits = gradient_bits<Type>(padded, slope);
  std::memcpy(padded, &bits, sizeof(bits));
  for (int64_t j = 0; j < count; ++j) out[j] = padded[j];
}

template <class Type>
void gradient_range(const typename Type::Element* x, typename Type::Element* out, int64_t count,
                    const Slope& slope, bool stream) {
  constexpr int64_t kBytes = sizeof(vint);
  int64_t i = 0;
  if (stream) {
    const int64_t ahead = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) & (kBytes - 1);
    i = smaller(count, ahead / static_cast<int64_t>(sizeof(typename Type::Element)));
    partial_gradient<Type>(x, out, i, slope);
    for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
      stream_bits(out + i, gradient_bits<Type>(x + i, slope));
    }
  } else {
    for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
      const vint bits = gradient_bits<Type>(x + i, slope);
      std::memcpy(out + i, &bits, sizeof(bits));
    }
  }
  partial_gradient<Type>(x + i, out + i, count - i, slope);
}

template <class Type>
void backward(const LogprobsBackwardArgs& args) {
  using Element = typename Type::Element;
  const LogitRows& rows = args.rows;
  const int64_t segments = segments_of(rows);
  const int64_t count = rows.outer * rows.inner;
  const bool in_place = args.grad_logits == rows.logits;
  const int64_t bytes = count * rows.vocab * static_cast<int64_t>(sizeof(Element));
  const bool stream = !in_place && bytes >= kStreamFromBytes;
  if (stream) advise_huge_pages(args.grad_logits, bytes);
  const int64_t grain = larger(1, kElementsPerTask / smaller(larger(rows.vocab, 1), kSegment));
  // A row of several segments is one task: its label is read before any of it is overwritten.
  parallel_for(count, larger(1, grain / segments), rows.threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const Row<Type> row(rows, index);
      const RowGradient<Type> gradient(args, row, index);
      Element* out = static_cast<Element*>(args.grad_logits) +
                     index / rows.inner * args.grad_outer_stride +
                     index % rows.inner * args.grad_inner_stride;
      if (gradient.zero) {
        std::memset(out, 0, static_cast<size_t>(rows.vocab) * sizeof(Element));
        continue;
      }
      const Slope slope{splat(row.scale), splat(-gradient.shift), splat(gradient.a),
                        splat(gradient.b)};
      gradient_range<Type>(row.x, out, rows.vocab, slope, stream);
      if (row.label_in(0, rows.vocab)) {
        Type::set(out + row.label, static_cast<float>(gradient.at_label));
      }
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void logprobs_from_logits_forward(const LogprobsForwardArgs& args) {
  if (args.rows.dtype == DType::f32) {
    if (args.entropy == nullptr) return forward<Float32, false>(args);
    return forward<Float32, true>(args);
  }
  if (args.entropy == nullptr) return forward<BFloat16, false>(args);
  return forward<BFloat16, true>(args);
}

void logprobs_from_logits_backward(const LogprobsBackwardArgs& args) {
  if (args.rows.dtype == DType::f32) return backward<Float32>(args);
  backward<BFloat16>(args);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
