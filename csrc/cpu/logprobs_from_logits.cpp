// Log-prob, entropy and their gradient of rows of logits; the sums are in cpu/logit_sums.h.
#include "cpu/logprobs_from_logits.h"

#include <cmath>
#include <cstdlib>

#include "cpu/logit_sums.h"
#include "cpu/softcap.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kElementsPerTask = 65536;    // about 5 us: well above the cost of a task
constexpr int64_t kStreamFromBytes = 8 << 20;  // a gradient that will not stay in the caches anyway
constexpr double kLn2 = 0.6931471805599453;

// The arguments of one row, with the scale exactly as the vector code uses it.
template <class Type>
struct Row {
  const typename Type::Element* x;
  int64_t label;   // a column, perhaps of another shard
  bool in_vocab;
  bool ignored;
  double inverse_temperature;
  float scale;     // log2(e) / temperature

  // `row` of the logits, `slot` among the labels.
  Row(const LogitRows& rows, int64_t row, int64_t slot) {
    x = static_cast<const typename Type::Element*>(rows.logits) +
        row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
    const int64_t id = rows.labels[slot];
    label = id - rows.vocab_start;
    in_vocab = id >= 0 && id < rows.vocab_size;
    ignored = id == rows.ignore_index;
    inverse_temperature =
        1.0 / (rows.temperature == nullptr ? rows.scalar_temperature
                                           : static_cast<double>(rows.temperature[slot]));
    scale = static_cast<float>(inverse_temperature * kLog2E);
  }
};

// An entry before the temperature, and its derivative by the logit.
struct Entry {
  float value;
  double slope;
};

template <class Type>
Entry entry_at(const typename Type::Element* x, double softcap) {
  if (softcap == 0.0) return {Type::get(x), 1.0};
  const Softcap cap(softcap);
  const vfloat t = cap.tanh_at(splat(Type::get(x)));  // the bits that the sums have seen
  return {(cap.cap * t)[0], 1.0 - static_cast<double>(t[0]) * static_cast<double>(t[0])};
}

// ---- forward ----------------------------------------------------------------------------------

int64_t row_of(const LogprobsForwardArgs& args, int64_t slot) {
  return args.row_of == nullptr ? slot : args.row_of[slot];
}

template <class Type>
void finish_row(const LogprobsForwardArgs& args, int64_t slot, const Stats& stats) {
  const Row<Type> row(args.rows, row_of(args, slot), slot);
  const double log2_sum = std::log2(stats.sum);
  const double lse = static_cast<double>(stats.shift) + log2_sum;
  double result = NAN;
  if (row.in_vocab && row.label >= 0 && row.label < args.rows.columns) {
    const Entry entry = entry_at<Type>(row.x + row.label, args.rows.softcap);
    result = static_cast<double>(entry.value) * row.scale - (args.shard ? 0.0 : lse);
  } else if (row.in_vocab && args.shard) {
    result = 0.0;
  }
  args.logprobs[slot] = static_cast<float>(result * kLn2);
  args.lse[slot] = lse * kLn2;
  if (args.entropy != nullptr) {
    args.entropy[slot] = static_cast<float>((log2_sum - stats.weighted / stats.sum) * kLn2);
  }
}

// Writes the zeros of an ignored row; false for any other.
bool skip_row(const LogprobsForwardArgs& args, int64_t slot) {
  if (args.rows.labels[slot] != args.rows.ignore_index) return false;
  args.logprobs[slot] = 0.0f;
  args.lse[slot] = 0.0;
  if (args.entropy != nullptr) args.entropy[slot] = 0.0f;
  return true;
}

int64_t segments_of(const LogitRows& rows) { return (rows.columns + kSegment - 1) / kSegment; }

template <class Type, bool kEntropy>
Stats stats_of(const LogprobsForwardArgs& args, int64_t slot, int64_t segment) {
  const Row<Type> row(args.rows, row_of(args, slot), slot);
  const int64_t begin = segment * kSegment;
  const int64_t count = smaller(kSegment, args.rows.columns - begin);
  if (args.rows.softcap == 0.0) {
    return segment_stats<Type, kEntropy>(row.x + begin, count, row.scale);
  }
  float capped[kSegment];
  cap_entries<Type>(row.x + begin, count, Softcap(args.rows.softcap), capped);
  return segment_stats<Float32, kEntropy>(capped, count, row.scale);
}

template <class Type, bool kEntropy>
void forward_by_rows(const LogprobsForwardArgs& args) {
  const int64_t segments = segments_of(args.rows);
  const int64_t grain = larger(1, kElementsPerTask / larger(args.rows.columns, 1));
  parallel_for(args.count, grain, args.rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      if (skip_row(args, slot)) continue;
      Stats total;
      for (int64_t segment = 0; segment < segments; ++segment) {
        merge(total, stats_of<Type, kEntropy>(args, slot, segment));
      }
      finish_row<Type>(args, slot, total);
    }
  });
}

// Fewer rows than would keep the threads busy: the segments are the tasks. False without memory.
template <class Type, bool kEntropy>
bool forward_by_segments(const LogprobsForwardArgs& args) {
  const int64_t segments = segments_of(args.rows);
  Stats* partial = static_cast<Stats*>(
      std::malloc(static_cast<size_t>(args.count * segments) * sizeof(Stats)));
  if (partial == nullptr) return false;
  parallel_for(args.count * segments, 1, args.rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slot = task / segments;
      if (args.rows.labels[slot] == args.rows.ignore_index) continue;
      partial[task] = stats_of<Type, kEntropy>(args, slot, task % segments);
    }
  });
  for (int64_t slot = 0; slot < args.count; ++slot) {
    if (skip_row(args, slot)) continue;
    Stats total;
    for (int64_t segment = 0; segment < segments; ++segment) {
      merge(total, partial[slot * segments + segment]);
    }
    finish_row<Type>(args, slot, total);
  }
  std::free(partial);
  return true;
}

template <class Type, bool kEntropy>
void forward(const LogprobsForwardArgs& args) {
  const bool few = args.count < 4 * static_cast<int64_t>(args.rows.threads);
  if (args.rows.threads > 1 && few && segments_of(args.rows) > 1 &&
      forward_by_segments<Type, kEntropy>(args)) {
    return;
  }
  forward_by_rows<Type, kEntropy>(args);
}

// ---- backward ---------------------------------------------------------------------------------

// With t = y - shift and p = 2^t * correction: the gradient of an entry is 2^t (a + b t), times the
// slope of the cap, and the label's own is computed apart, in fp64.
template <class Type>
struct RowGradient {
  float shift = 0.0f;
  float a = 0.0f;
  float b = 0.0f;
  double at_label = 0.0;
  bool zero;
  bool holds_label;

  RowGradient(const LogprobsBackwardArgs& args, const Row<Type>& row, int64_t slot) {
    const double g = args.grad_logprobs == nullptr ? 0.0 : args.grad_logprobs[slot];
    const double h = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[slot];
    zero = row.ignored || (g == 0.0 && h == 0.0);
    holds_label = row.in_vocab && row.label >= 0 && row.label < args.rows.columns;
    if (zero) return;
    const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[slot];
    const double lse = args.lse[slot] * kLog2E;
    shift = static_cast<float>(lse);
    const double rest = static_cast<double>(shift) - lse;
    const double correction = std::exp2(rest) * row.inverse_temperature;
    a = static_cast<float>(-(g + h * (entropy + kLn2 * rest)) * correction);
    b = static_cast<float>(-h * kLn2 * correction);
    if (!row.in_vocab) a = b = NAN;
    if (!holds_label) return;
    const Entry entry = entry_at<Type>(row.x + row.label, args.rows.softcap);
    const double log2_p = static_cast<double>(entry.value) * row.scale - lse;
    const double p = std::exp2(log2_p);
    const double from_entropy = p == 0.0 ? 0.0 : h * p * (log2_p * kLn2 + entropy);
    at_label = (g * (1.0 - p) - from_entropy) * row.inverse_temperature * entry.slope;
  }
};

template <bool kCapped>
struct Slope {
  vfloat scale, minus_shift, a, b;
  Softcap softcap;

  inline vfloat at(vfloat x) const {
    vfloat z = x;
    vfloat by_logit;
    if (kCapped) {
      const vfloat t = softcap.tanh_at(x);
      z = softcap.cap * t;
      by_logit = splat(1.0f) - t * t;
    }
    const vfloat t = fma(z, scale, minus_shift);
    const vfloat clamped = vmax(splat(kLowestExponent), t);
    vfloat value = exp2_normal(clamped) * fma(b, clamped, a);
    if (kCapped) value *= by_logit;
    return select(t < splat(kLowestExponent), splat(0.0f), value);  // exact 0 at -inf
  }
};

template <class Type, class Curve>
inline vint gradient_bits(const typename Type::Element* x, const Curve& slope) {
  vfloat value[Type::kVectors];
  Type::read(x, value);
  for (vfloat& v : value) v = slope.at(v);
  return Type::pack(value);
}

// `count` < one vector.
template <class Type, class Curve>
void partial_gradient(const typename Type::Element* x, typename Type::Element* out, int64_t count,
                      const Curve& slope) {
  typename Type::Element padded[Type::kPerVector];
  for (int64_t j = 0; j < Type::kPerVector; ++j) padded[j] = j < count ? x[j] : Type::lowest();
  const vint bits = gradient_bits<Type>(padded, slope);
  std::memcpy(padded, &bits, sizeof(bits));
  for (int64_t j = 0; j < count; ++j) out[j] = padded[j];
}

template <class Type, class Curve>
void gradient_range(const typename Type::Element* x, typename Type::Element* out, int64_t count,
                    const Curve& slope, bool stream) {
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

// To another dtype: block by block through the first-level cache, in fp32.
template <class Type, class Curve>
void gradient_range(const float* x, uint16_t* out, int64_t count, const Curve& slope, bool) {
  float block[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = smaller(kBlock, count - begin);
    gradient_range<Float32>(x + begin, block, length, slope, false);
    for (int64_t j = 0; j < length; ++j) out[begin + j] = float_to_bf16(block[j]);
  }
}

template <class Type, class Curve>
void gradient_range(const uint16_t* x, float* out, int64_t count, const Curve& slope, bool stream) {
  float block[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = smaller(kBlock, count - begin);
    for (int64_t j = 0; j < length; ++j) block[j] = bf16_to_float(x[begin + j]);
    gradient_range<Float32>(block, out + begin, length, slope, stream);
  }
}

template <class Type, class Out>
void write_row(const LogprobsBackwardArgs& args, int64_t index, int64_t slot,
               typename Out::Element* out, bool stream) {
  const LogitRows& rows = args.rows;
  const Row<Type> row(rows, index, slot);
  const RowGradient<Type> gradient(args, row, slot);
  const int64_t begin = gradient.zero ? 0 : rows.columns;
  if (!gradient.zero) {
    const auto fill = [&](const auto& slope) {
      gradient_range<Type>(row.x, out, rows.columns, slope, stream);
    };
    const vfloat scale = splat(row.scale), minus_shift = splat(-gradient.shift);
    const vfloat a = splat(gradient.a), b = splat(gradient.b);
    const Softcap softcap(rows.softcap == 0.0 ? 1.0 : rows.softcap);
    if (rows.softcap == 0.0) {
      fill(Slope<false>{scale, minus_shift, a, b, softcap});
    } else {
      fill(Slope<true>{scale, minus_shift, a, b, softcap});
    }
    if (gradient.holds_label) Out::set(out + row.label, static_cast<float>(gradient.at_label));
  }
  std::memset(out + begin, 0, static_cast<size_t>(args.width - begin) * sizeof(*out));
}

template <class Type, class Out>
void backward(const LogprobsBackwardArgs& args) {
  using Element = typename Out::Element;
  const LogitRows& rows = args.rows;
  const int64_t count = rows.outer * rows.inner;
  const bool in_place = args.grad_logits == rows.logits;
  const int64_t bytes = count * args.width * static_cast<int64_t>(sizeof(Element));
  const bool stream = !in_place && bytes >= kStreamFromBytes;
  if (stream) advise_huge_pages(args.grad_logits, bytes);
  // A row is one task: its label is read before any of it is overwritten.
  const int64_t grain = larger(1, kElementsPerTask / larger(args.width, 1));
  parallel_for(count, grain, rows.threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      Element* out = static_cast<Element*>(args.grad_logits) +
                     index / rows.inner * args.grad_outer_stride +
                     index % rows.inner * args.grad_inner_stride;
      const int64_t slot = args.slot_of == nullptr ? index : args.slot_of[index];
      if (slot < 0) {
        std::memset(out, 0, static_cast<size_t>(args.width) * sizeof(Element));
      } else {
        write_row<Type, Out>(args, index, slot, out, stream);
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
  const bool to_f32 = args.grad_dtype == DType::f32;
  if (args.rows.dtype == DType::f32) {
    return to_f32 ? backward<Float32, Float32>(args) : backward<Float32, BFloat16>(args);
  }
  return to_f32 ? backward<BFloat16, Float32>(args) : backward<BFloat16, BFloat16>(args);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
