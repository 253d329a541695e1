// The exact KL of rows of logits and its gradient; the sums are in cpu/kl_sums.h.
#include "cpu/kl_from_logits.h"

#include <cmath>
#include <cstdlib>

#include "cpu/kl_sums.h"
#include "cpu/softcap.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kElementsPerTask = 65536;    // about 10 us: well above the cost of a task
constexpr int64_t kGradientBlock = 2048;       // three of 8 KiB stay in the first-level cache
constexpr int64_t kStreamFromBytes = 8 << 20;  // a gradient that will not stay in the caches anyway

int64_t count_of(const KlRows& rows) { return rows.actor.outer * rows.actor.inner; }

double temperature_of(const KlRows& rows, int64_t index) {
  return rows.temperature == nullptr ? rows.scalar_temperature
                                     : static_cast<double>(rows.temperature[index]);
}

template <class Element>
Element* row_of(const KlSide& side, int64_t index) {
  return static_cast<Element*>(side.data) + index / side.inner * side.outer_stride +
         index % side.inner * side.inner_stride;
}

// Entries [begin, begin + count) of a row as fp32 with the softcap applied: the tensor's own memory
// when it is that already, otherwise a copy in `scratch`.
const float* capped_entries(const KlSide& side, int64_t index, int64_t begin, int64_t count,
                            float* scratch) {
  const float* source = scratch;
  if (side.dtype == DType::f32) {
    source = row_of<const float>(side, index) + begin;
  } else {
    const uint16_t* bits = row_of<const uint16_t>(side, index) + begin;
    for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(bits[i]);
  }
  if (side.softcap == 0.0) return source;
  cap_entries<Float32>(source, count, Softcap(side.softcap), scratch);
  return scratch;
}

// ---- forward ----------------------------------------------------------------------------------

int64_t segments_of(const KlRows& rows) { return (rows.columns + kSegment - 1) / kSegment; }

template <class Type>
KlStats direct_stats(const KlRows& rows, int64_t index, int64_t begin, int64_t count) {
  using Element = const typename Type::Element;
  return segment_stats<Type>({row_of<Element>(rows.actor, index) + begin,
                              row_of<Element>(rows.reference, index) + begin, count,
                              KlScale(temperature_of(rows, index))});
}

KlStats stats_of(const KlRows& rows, int64_t index, int64_t segment) {
  const int64_t begin = segment * kSegment;
  const int64_t count = smaller(kSegment, rows.columns - begin);
  const bool capped = rows.actor.softcap != 0.0 || rows.reference.softcap != 0.0;
  if (!capped && rows.actor.dtype == rows.reference.dtype) {
    return rows.actor.dtype == DType::f32 ? direct_stats<Float32>(rows, index, begin, count)
                                          : direct_stats<BFloat16>(rows, index, begin, count);
  }
  float actor[kSegment], reference[kSegment];
  return segment_stats<Float32>({capped_entries(rows.actor, index, begin, count, actor),
                                 capped_entries(rows.reference, index, begin, count, reference),
                                 count, KlScale(temperature_of(rows, index))});
}

bool masked(const KlForwardArgs& args, int64_t index) {
  return args.mask != nullptr && args.mask[index] == 0;
}

void finish_row(const KlForwardArgs& args, int64_t index, const KlStats& stats) {
  if (masked(args, index)) {
    args.kl[index] = 0.0f;
    args.lse[index] = args.ref_lse[index] = 0.0;
    return;
  }
  double kl = stats.divergence();
  const double lse = stats.shift * kLn2 + std::log(stats.sum);
  double ref_lse = lse - stats.lse_difference();
  if (stats.sum == 0.0 || stats.ref_sum == 0.0) {  // a side without anything above -inf
    kl = !args.shard ? NAN : stats.sum == 0.0 ? 0.0 : HUGE_VAL;
    ref_lse = stats.ref_shift() + std::log(stats.ref_sum);
  }
  args.kl[index] = static_cast<float>(kl);
  args.lse[index] = lse;
  args.ref_lse[index] = ref_lse;
}

void forward_by_rows(const KlForwardArgs& args) {
  const KlRows& rows = args.rows;
  const int64_t grain = larger(1, kElementsPerTask / larger(rows.columns, 1));
  parallel_for(count_of(rows), grain, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      KlStats total;
      for (int64_t segment = 0; segment < segments_of(rows) && !masked(args, index); ++segment) {
        merge(total, stats_of(rows, index, segment));
      }
      finish_row(args, index, total);
    }
  });
}

// Fewer rows than would keep the threads busy: the segments are the tasks. False without memory.
bool forward_by_segments(const KlForwardArgs& args) {
  const KlRows& rows = args.rows;
  const int64_t count = count_of(rows), segments = segments_of(rows);
  KlStats* partial = static_cast<KlStats*>(
      std::malloc(static_cast<size_t>(count * segments) * sizeof(KlStats)));
  if (partial == nullptr) return false;
  parallel_for(count * segments, 1, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / segments;
      if (!masked(args, index)) partial[task] = stats_of(rows, index, task % segments);
    }
  });
  for (int64_t index = 0; index < count; ++index) {
    KlStats total;
    for (int64_t segment = 0; segment < segments && !masked(args, index); ++segment) {
      merge(total, partial[index * segments + segment]);
    }
    finish_row(args, index, total);
  }
  std::free(partial);
  return true;
}

// ---- backward ---------------------------------------------------------------------------------

// grad = coefficient 2^(y - shift) ((x - x') / T - centre - rest), and 0 where p is.
struct KlSlope {
  vfloat scale, inverse, minus_shift, coefficient, minus_centre, minus_rest, inverse_cap;
  bool capped;

  KlSlope(const KlBackwardArgs& args, int64_t index) {
    const double temperature = temperature_of(args.rows, index);
    const KlScale row(temperature);
    const double lse = args.lse[index] * kLog2E;
    const float shift = static_cast<float>(lse);
    const double centre = args.lse[index] - args.ref_lse[index];
    const double kl = static_cast<double>(args.kl[index]);
    const double size = args.grad_kl[index] / temperature * std::exp2(shift - lse);
    const float high = static_cast<float>(centre);
    scale = splat(row.log2);
    inverse = splat(row.inverse);
    minus_shift = splat(-shift);
    coefficient = splat(kl - kl == 0.0 ? static_cast<float>(size) : NAN);
    minus_centre = splat(-high);
    minus_rest = splat(static_cast<float>(high - centre - kl));
    capped = args.rows.actor.softcap != 0.0;
    inverse_cap = splat(capped ? static_cast<float>(1.0 / args.rows.actor.softcap) : 0.0f);
  }

  inline vfloat at(vfloat x, vfloat ref) const {
    const vfloat y = fma(x, scale, minus_shift);
    const vfloat p = exp2_normal(vmax(splat(kLowestExponent), vmin(splat(126.0f), y)));
    vfloat value = coefficient * p * (fma(x - ref, inverse, minus_centre) + minus_rest);
    if (capped) {
      const vfloat t = x * inverse_cap;
      value *= splat(1.0f) - t * t;
    }
    return select(y < splat(kLowestExponent), splat(0.0f), value);
  }
};

template <class Type>
vint gradient_bits(const typename Type::Element* x, const typename Type::Element* ref,
                   const KlSlope& slope) {
  vfloat value[Type::kVectors], other[Type::kVectors];
  Type::read(x, value);
  Type::read(ref, other);
  for (int k = 0; k < Type::kVectors; ++k) value[k] = slope.at(value[k], other[k]);
  return Type::pack(value);
}

// `count` < one vector.
template <class Type>
void partial_gradient(const typename Type::Element* x, const typename Type::Element* ref,
                      typename Type::Element* out, int64_t count, const KlSlope& slope) {
  typename Type::Element padded[2][Type::kPerVector];
  for (int64_t j = 0; j < Type::kPerVector; ++j) {
    padded[0][j] = j < count ? x[j] : Type::lowest();
    padded[1][j] = j < count ? ref[j] : Type::lowest();
  }
  const vint bits = gradient_bits<Type>(padded[0], padded[1], slope);
  std::memcpy(padded[0], &bits, sizeof(bits));
  for (int64_t j = 0; j < count; ++j) out[j] = padded[0][j];
}

template <class Type>
void gradient_range(const typename Type::Element* x, const typename Type::Element* ref,
                    typename Type::Element* out, int64_t count, const KlSlope& slope, bool stream) {
  constexpr int64_t kBytes = sizeof(vint);
  int64_t i = 0;
  if (stream) {
    const int64_t ahead = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) & (kBytes - 1);
    i = smaller(count, ahead / static_cast<int64_t>(sizeof(typename Type::Element)));
    partial_gradient<Type>(x, ref, out, i, slope);
    for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
      stream_bits(out + i, gradient_bits<Type>(x + i, ref + i, slope));
    }
  }
  for (; i + Type::kPerVector <= count; i += Type::kPerVector) {
    const vint bits = gradient_bits<Type>(x + i, ref + i, slope);
    std::memcpy(out + i, &bits, sizeof(bits));
  }
  partial_gradient<Type>(x + i, ref + i, out + i, count - i, slope);
}

template <class Type>
void write_row(const KlBackwardArgs& args, int64_t index, bool stream) {
  const KlRows& rows = args.rows;
  using Element = typename Type::Element;
  Element* out = row_of<Element>(args.grad, index);
  const bool zero = args.grad_kl[index] == 0.0f;
  if (!args.accumulate) {
    const int64_t from = zero ? 0 : rows.columns;
    std::memset(out + from, 0, static_cast<size_t>(args.width - from) * sizeof(Element));
  }
  if (zero) return;
  const KlSlope slope(args, index);
  const bool same = rows.actor.dtype == args.grad.dtype && rows.reference.dtype == args.grad.dtype;
  if (same && !args.accumulate && rows.actor.softcap == 0.0 && rows.reference.softcap == 0.0) {
    gradient_range<Type>(row_of<Element>(rows.actor, index), row_of<Element>(rows.reference, index),
                         out, rows.columns, slope, stream);
    return;
  }
  float actor[kGradientBlock], reference[kGradientBlock], grad[kGradientBlock];
  for (int64_t begin = 0; begin < rows.columns; begin += kGradientBlock) {
    const int64_t count = smaller(kGradientBlock, rows.columns - begin);
    const float* x = capped_entries(rows.actor, index, begin, count, actor);
    const float* ref = capped_entries(rows.reference, index, begin, count, reference);
    gradient_range<Float32>(x, ref, grad, count, slope, false);
    for (int64_t i = 0; i < count; ++i) {
      Type::set(out + begin + i, args.accumulate ? Type::get(out + begin + i) + grad[i] : grad[i]);
    }
  }
}

template <class Type>
void backward(const KlBackwardArgs& args) {
  const int64_t count = count_of(args.rows);
  const int64_t bytes = count * args.width * static_cast<int64_t>(sizeof(typename Type::Element));
  const bool over_logits =
      args.grad.data == args.rows.actor.data || args.grad.data == args.rows.reference.data;
  const bool stream = !over_logits && !args.accumulate && bytes >= kStreamFromBytes;
  if (stream) advise_huge_pages(args.grad.data, bytes);
  const int64_t grain = larger(1, kElementsPerTask / larger(args.width, 1));
  parallel_for(count, grain, args.rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) write_row<Type>(args, index, stream);
    if (stream) stream_fence();
  });
}

}  // namespace

void kl_from_logits_forward(const KlForwardArgs& args) {
  const KlRows& rows = args.rows;
  const bool few = count_of(rows) < 4 * static_cast<int64_t>(rows.threads);
  if (rows.threads > 1 && few && segments_of(rows) > 1 && forward_by_segments(args)) return;
  forward_by_rows(args);
}

void kl_from_logits_backward(const KlBackwardArgs& args) {
  if (args.grad.dtype == DType::f32) return backward<Float32>(args);
  backward<BFloat16>(args);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
