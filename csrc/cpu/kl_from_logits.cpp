// Exact KL of rows of logits in one sweep over both sides.
//
// With d_j = z_j - q_j - c for any constant c, p = softmax(z) and m = sum_j p_j d_j:
//
//     KL = m + log sum_j p_j exp(-d_j) = m + log1p(K - m),     K = sum_j p_j (exp(-d_j) - 1 + d_j)
//
// K is a sum of terms that are not negative, so a policy that has barely moved, whose KL of 1e-6 would
// drown in the rounding of sum p (z - q) - lse + ref_lse, keeps its digits; c, the mean of z - q over the
// first entries, keeps m small. Where the two distributions peak more than e^60 apart the terms of K leave
// the range of fp32, and that plain form, which is then exact enough, is used.
//
// Both sides of a block are brought to y = z log2(e) in fp32 in the first-level cache, so that dtype and
// softcap are dealt with once. Sums are fp32 per lane within a block and fp64 across blocks.
#include "cpu/kl_from_logits.h"

#include <cmath>

#include "cpu/logit_sums.h"
#include "cpu/softcap.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kKlBlock = 2048;  // two of 8 KiB
constexpr int64_t kElementsPerTask = 32768;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kFarApart = 86.0;  // in powers of two: about e^60

// ---- one side of a block ----------------------------------------------------------------------

// y of `count` entries, padded with -inf to whole vectors.
struct alignas(64) Side {
  float y[kKlBlock];

  template <class Type>
  void read(const typename Type::Element* x, int64_t count, float scale, double softcap) {
    for (int64_t i = 0; i < count; ++i) y[i] = Type::get(x + i);
    int64_t padded = count;
    for (; padded % kLanes != 0; ++padded) y[padded] = -HUGE_VALF;
    const vfloat factor = splat(scale);
    if (softcap == 0.0) {
      for (int64_t i = 0; i < count; i += kLanes) store(y + i, load(y + i) * factor);
    } else {
      const Softcap cap(softcap);
      for (int64_t i = 0; i < count; i += kLanes) {
        store(y + i, cap.cap * cap.tanh_at(load(y + i)) * factor);
      }
      for (int64_t i = count; i < padded; ++i) y[i] = -HUGE_VALF;
    }
  }

  void read(const View& view, int64_t offset, int64_t count, float scale, double softcap) {
    if (view.dtype == DType::f32) {
      read<Float32>(static_cast<const float*>(view.data) + offset, count, scale, softcap);
    } else {
      read<BFloat16>(static_cast<const uint16_t*>(view.data) + offset, count, scale, softcap);
    }
  }

  // NaN entries are passed over.
  float max(int64_t count) const {
    vfloat best = splat(-HUGE_VALF);
    for (int64_t i = 0; i < count; i += kLanes) best = vmax(load(y + i), best);
    return max_lanes(best);
  }
};

inline float row_scale(const KlRows& rows, int64_t row) {
  const double temperature = rows.temperature == nullptr
                                 ? rows.scalar_temperature
                                 : static_cast<double>(rows.temperature[row]);
  return static_cast<float>(kLog2E / temperature);
}

inline bool skipped(const KlRows& rows, int64_t row) {
  return rows.mask.data != nullptr && rows.mask.data[row * rows.mask.row_stride] == 0;
}

// 2^t, exactly 0 below the normal numbers and at -inf; NaN gives NaN.
inline vfloat power(vfloat t) {
  const vfloat lowest = splat(kLowestExponent);
  return select(t < lowest, splat(0.0f), exp2_normal(vmax(lowest, t)));
}

// ---- forward ----------------------------------------------------------------------------------

// exp(-d) - 1 + d for |d| < 0.5: Taylor, error below one fp32 ulp.
inline vfloat small_term(vfloat d) {
  const vfloat x = -d;
  vfloat p = fma(splat(1.0f / 40320.0f), x, splat(1.0f / 5040.0f));
  p = fma(p, x, splat(1.0f / 720.0f));
  p = fma(p, x, splat(1.0f / 120.0f));
  p = fma(p, x, splat(1.0f / 24.0f));
  p = fma(p, x, splat(1.0f / 6.0f));
  p = fma(p, x, splat(0.5f));
  return p * x * x;
}

// Sums relative to 2^shift (ref_sum: 2^ref_shift).
struct RowSums {
  float shift = -HUGE_VALF, ref_shift = -HUGE_VALF;
  double sum = 0.0, ref_sum = 0.0;
  double weighted = 0.0;  // sum of p d, nats
  double terms = 0.0;     // sum of p (exp(-d) - 1 + d)
  double farthest = 0.0;  // largest |shift - ref_shift - centre| of a block

  void raise(float highest, float ref_highest) {
    if (highest > shift) {
      const double factor = std::exp2(static_cast<double>(shift) - static_cast<double>(highest));
      if (sum != 0.0) {  // an empty sum must not become 0 * inf
        sum *= factor;
        weighted *= factor;
      }
      if (terms != 0.0) terms *= factor;
      shift = highest;
    }
    if (ref_highest > ref_shift) {
      if (ref_sum != 0.0) {
        ref_sum *= std::exp2(static_cast<double>(ref_shift) - static_cast<double>(ref_highest));
      }
      ref_shift = ref_highest;
    }
  }
};

// The mean of z - q over the first entries where it is a number, in powers of two.
float centre_of(const Side& z, const Side& q, int64_t count) {
  double sum = 0.0;
  int64_t used = 0;
  for (int64_t i = 0; i < smaller(count, kProbe); ++i) {
    const double d = static_cast<double>(z.y[i]) - static_cast<double>(q.y[i]);
    if (d - d != 0.0) continue;  // infinite or NaN
    sum += d;
    ++used;
  }
  return used == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(used));
}

void add_block(const Side& z, const Side& q, int64_t count, float centre, RowSums& total) {
  const float highest = z.max(count), ref_highest = q.max(count);
  total.raise(highest, ref_highest);
  // Entries of the reference before the first of p have no scale to be held against.
  if (total.shift == -HUGE_VALF && ref_highest > -HUGE_VALF) total.farthest = HUGE_VAL;
  const float shift = total.shift == -HUGE_VALF ? 0.0f : total.shift;
  const float ref_shift = total.ref_shift == -HUGE_VALF ? 0.0f : total.ref_shift;
  // exp(q + c) relative to 2^shift is exp(q) relative to 2^ref_shift times this.
  const double apart = static_cast<double>(ref_shift) + centre - shift;
  if (std::fabs(apart) > total.farthest || apart != apart) total.farthest = std::fabs(apart);
  const double bounded = apart > kFarApart ? kFarApart : (apart < -kFarApart ? -kFarApart : apart);
  const vfloat ratio = splat(static_cast<float>(std::exp2(bounded)));
  const vfloat zero = splat(0.0f), half = splat(0.5f);
  vfloat sum = zero, ref_sum = zero, weighted = zero, terms = zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat y = load(z.y + i), ref_y = load(q.y + i);
    const vfloat p = power(y - splat(shift));
    const vfloat ref_p = power(ref_y - splat(ref_shift));
    const vfloat d = ((y - ref_y) - splat(centre)) * splat(static_cast<float>(kLn2));
    const vint none = p == zero;
    const vfloat by_p = select(none, zero, p * d);
    const vint small = (d > -half) & (d < half);
    const vfloat far = fma(ref_p, ratio, by_p - p);
    sum += p;
    ref_sum += ref_p;
    weighted += by_p;
    terms += select(small, p * small_term(d), far);
  }
  total.sum += add_lanes(sum);
  total.ref_sum += add_lanes(ref_sum);
  total.weighted += add_lanes(weighted);
  total.terms += add_lanes(terms);
}

void finish_row(const KlForwardArgs& args, int64_t row, float centre, const RowSums& sums) {
  const double lse = (static_cast<double>(sums.shift) + std::log2(sums.sum)) * kLn2;
  const double ref_lse = (static_cast<double>(sums.ref_shift) + std::log2(sums.ref_sum)) * kLn2;
  const double mean = sums.weighted / sums.sum;
  const double gap = mean + static_cast<double>(centre) * kLn2;  // sum of p (z - q)
  args.lse[row] = lse;
  args.ref_lse[row] = ref_lse;
  if (args.shard) {
    args.kl[row] = gap;
    return;
  }
  const double excess = sums.terms / sums.sum - mean;
  const bool near = sums.farthest < kFarApart && excess > -0.9 && excess - excess == 0.0;
  const double kl = near ? std::log1p(excess) + mean : gap - lse + ref_lse;
  args.kl[row] = kl < 0.0 ? 0.0 : kl;  // a rounding below zero; NaN passes
}

void forward_row(const KlForwardArgs& args, int64_t row) {
  const KlRows& rows = args.rows;
  const float scale = row_scale(rows, row);
  Side z, q;
  RowSums sums;
  float centre = 0.0f;
  for (int64_t begin = 0; begin < rows.columns; begin += kKlBlock) {
    const int64_t count = smaller(kKlBlock, rows.columns - begin);
    z.read(rows.logits, row * rows.logits.row_stride + begin, count, scale, rows.softcap);
    q.read(rows.ref_logits, row * rows.ref_logits.row_stride + begin, count, scale,
           rows.ref_softcap);
    if (begin == 0) centre = centre_of(z, q, count);
    add_block(z, q, count, centre, sums);
  }
  finish_row(args, row, centre, sums);
}

// ---- backward ---------------------------------------------------------------------------------

// dKL/dx = p ((z - q) - (lse - ref_lse) - KL) / temperature, times the slope of the softcap.
struct RowGradient {
  vfloat minus_shift, offset, factor, by_cap;
  bool capped;

  RowGradient(const KlBackwardArgs& args, int64_t row, float scale) {
    const double shift = args.lse[row] * kLog2E;
    const float rounded = static_cast<float>(shift);
    minus_shift = splat(-rounded);
    offset = splat(static_cast<float>(args.lse[row] - args.ref_lse[row] +
                                      static_cast<double>(args.kl[row])));
    factor = splat(static_cast<float>(static_cast<double>(args.grad_kl[row]) * scale * kLn2 *
                                      std::exp2(static_cast<double>(rounded) - shift)));
    capped = args.rows.softcap != 0.0;
    by_cap = splat(capped ? static_cast<float>(1.0 / (args.rows.softcap * scale)) : 0.0f);
  }

  inline vfloat at(vfloat y, vfloat ref_y) const {
    const vfloat p = power(y + minus_shift);
    const vfloat d = fma(y - ref_y, splat(static_cast<float>(kLn2)), -offset);
    vfloat value = p * d * factor;
    if (capped) {
      const vfloat t = y * by_cap;
      value *= splat(1.0f) - t * t;
    }
    return select(p == splat(0.0f), splat(0.0f), value);  // also where d is no number
  }
};

inline void write(const View& out, int64_t offset, const float* value, int64_t count, bool add) {
  if (out.dtype == DType::f32) {
    float* target = static_cast<float*>(const_cast<void*>(out.data)) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = add ? target[i] + value[i] : value[i];
  } else {
    uint16_t* target = static_cast<uint16_t*>(const_cast<void*>(out.data)) + offset;
    for (int64_t i = 0; i < count; ++i) {
      target[i] = float_to_bf16(add ? bf16_to_float(target[i]) + value[i] : value[i]);
    }
  }
}

void clear(const View& out, int64_t offset, int64_t count) {
  const size_t size = out.dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t);
  char* target = static_cast<char*>(const_cast<void*>(out.data)) + offset * static_cast<int64_t>(size);
  std::memset(target, 0, static_cast<size_t>(count) * size);
}

void backward_row(const KlBackwardArgs& args, int64_t row) {
  const KlRows& rows = args.rows;
  const int64_t start = row * args.out.row_stride;
  const bool none = skipped(rows, row) || args.grad_kl[row] == 0.0f;
  if (!args.accumulate) {
    const int64_t from = none ? 0 : rows.columns;
    clear(args.out, start + from, args.width - from);
  }
  if (none) return;
  const float scale = row_scale(rows, row);
  const RowGradient gradient(args, row, scale);
  Side z, q;
  for (int64_t begin = 0; begin < rows.columns; begin += kKlBlock) {
    const int64_t count = smaller(kKlBlock, rows.columns - begin);
    z.read(rows.logits, row * rows.logits.row_stride + begin, count, scale, rows.softcap);
    q.read(rows.ref_logits, row * rows.ref_logits.row_stride + begin, count, scale,
           rows.ref_softcap);
    for (int64_t i = 0; i < count; i += kLanes) {
      store(z.y + i, gradient.at(load(z.y + i), load(q.y + i)));
    }
    write(args.out, start + begin, z.y, count, args.accumulate);
  }
}

}  // namespace

void kl_from_logits_forward(const KlForwardArgs& args) {
  const KlRows& rows = args.rows;
  const int64_t grain = larger(1, kElementsPerTask / larger(rows.columns, 1));
  parallel_for(rows.rows, grain, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (skipped(rows, row)) {
        args.kl[row] = args.lse[row] = args.ref_lse[row] = 0.0;
      } else {
        forward_row(args, row);
      }
    }
  });
}

void kl_from_logits_backward(const KlBackwardArgs& args) {
  const KlRows& rows = args.rows;
  const int64_t grain = larger(1, kElementsPerTask / larger(rows.columns, 1));
  parallel_for(rows.rows, grain, rows.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row(args, row);
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
