// The three inner loops of attention over a block of keys: scores, softmax, weighted values.
//
// Rows are fp32 and `width` long, a multiple of kLanes; kChunks is width / kLanes where the compiler may
// know it, else 0.
#pragma once

#include "cpu/vec_math.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr int64_t kBlock = 64;

// Keys begin .. end - 1 of a block.
struct KeyRange {
  int64_t begin;
  int64_t end;
  bool empty() const { return begin >= end; }
};

// ---- across lanes ----------------------------------------------------------------------------------

// blend<W>: a where bit W of the lane's number is clear, b where it is set. swap<W>: lane l holds x[l ^ W].
#if defined(__AVX512F__)
template <int W>
inline vfloat blend(vfloat a, vfloat b) {
  constexpr __mmask16 upper = W == 1 ? 0xAAAA : W == 2 ? 0xCCCC : W == 4 ? 0xF0F0 : 0xFF00;
  return (vfloat)_mm512_mask_blend_ps(upper, (__m512)a, (__m512)b);
}
template <int W>
inline vfloat swap(vfloat x) {
  if constexpr (W <= 2) {
    return (vfloat)_mm512_maskz_permute_ps(kAll, (__m512)x, W == 1 ? 0xB1 : 0x4E);
  } else {
    return (vfloat)_mm512_maskz_shuffle_f32x4(kAll, (__m512)x, (__m512)x, W == 4 ? 0xB1 : 0x4E);
  }
}
#elif defined(__AVX2__)
template <int W>
inline vfloat blend(vfloat a, vfloat b) {
  return (vfloat)_mm256_blend_ps((__m256)a, (__m256)b, W == 1 ? 0xAA : W == 2 ? 0xCC : 0xF0);
}
template <int W>
inline vfloat swap(vfloat x) {
  if constexpr (W <= 2) {
    return (vfloat)_mm256_permute_ps((__m256)x, W == 1 ? 0xB1 : 0x4E);
  } else {
    return (vfloat)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
  }
}
#else
template <int W>
inline vfloat blend(vfloat a, vfloat b) {
  vfloat x;
  for (int l = 0; l < kLanes; ++l) x[l] = (l & W) == 0 ? a[l] : b[l];
  return x;
}
template <int W>
inline vfloat swap(vfloat x) {
  vfloat y;
  for (int l = 0; l < kLanes; ++l) y[l] = x[l ^ W];
  return y;
}
#endif

// Lane l holds a[l] + a[l ^ W] where bit W of l is clear, b[l] + b[l ^ W] where it is set.
template <int W>
inline vfloat fold(vfloat a, vfloat b) {
  return blend<W>(a, b) + swap<W>(blend<W>(b, a));
}

template <int W = 1>
inline float sum_of_lanes(vfloat x) {
  if constexpr (W == kLanes) {
    return x[0];
  } else {
    return sum_of_lanes<2 * W>(x + swap<W>(x));
  }
}

template <int W = 1>
inline float max_of_lanes(vfloat x) {
  if constexpr (W == kLanes) {
    return x[0];
  } else {
    return max_of_lanes<2 * W>(vmax(x, swap<W>(x)));
  }
}

// Lane l: the sum of x[l]. The tree is the same for every lane.
template <int W = 1>
inline vfloat sums_of_vectors(const vfloat* x) {
  vfloat half[kLanes / W / 2];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / W / 2; ++i) half[i] = fold<W>(x[2 * i], x[2 * i + 1]);
  if constexpr (2 * W == kLanes) {
    return half[0];
  } else {
    return sums_of_vectors<2 * W>(half);
  }
}

// ---- scores ----------------------------------------------------------------------------------------

// score[l] = q . key[l] for kLanes keys, which lie `offset` elements after where `key` points.
template <int kChunks>
inline void scores_of_vector(const float* q, const float* const* key, int64_t offset, int64_t width,
                             float* score) {
  const int64_t chunks = kChunks > 0 ? kChunks : width / kLanes;
  vfloat sum[kLanes];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    const float* k = key[l] + offset;
    sum[l] = load(q) * load(k);
    for (int64_t c = 1; c < chunks; ++c) {
      sum[l] = fma(load(q + c * kLanes), load(k + c * kLanes), sum[l]);
    }
  }
  store(score, sums_of_vectors(sum));
}

// score[j] = q . key[j] for the vectors of keys that meet the range.
template <int kChunks>
inline void scores_of(const float* q, const float* const* key, int64_t width, KeyRange range,
                      float* score) {
  for (int64_t j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) {
    scores_of_vector<kChunks>(q, key + j, 0, width, score + j);
  }
}

// ---- softmax ---------------------------------------------------------------------------------------

inline vint lane_numbers() {
  vint numbers;
  for (int l = 0; l < kLanes; ++l) numbers[l] = l;
  return numbers;
}

inline float exp2_of(float x) { return exp2_normal(vmax(splat(kLowestExponent), splat(x)))[0]; }

// Turns scores (in units of log2) of R rows into weights relative to the rows' new maxima, adds them to the
// rows' masses, and says what earlier sums must be multiplied by (1 if there are none). The rows go side by
// side: one alone would wait for each of its results.
template <int R>
inline void soften(float* score, KeyRange range, float* best, float* mass, float* factor) {
  const vint lanes = lane_numbers();
  const vfloat lowest = splat(-__builtin_inff());
  const int32_t begin = static_cast<int32_t>(range.begin), end = static_cast<int32_t>(range.end);
  const int64_t start = begin / kLanes * kLanes;
  vfloat top[R], sum[R];
  float now[R];
  for (int r = 0; r < R; ++r) top[r] = splat(best[r]), sum[r] = splat(0.0f);
  for (int64_t j = start; j < range.end; j += kLanes) {
    const vint at = lanes + static_cast<int32_t>(j);
    const vint seen = (at >= begin) & (at < end);
    for (int r = 0; r < R; ++r) {
      const vfloat x = select(seen, load(score + r * kBlock + j), lowest);
      store(score + r * kBlock + j, x);
      top[r] = vmax(x, top[r]);
    }
  }
  for (int r = 0; r < R; ++r) now[r] = max_of_lanes(top[r]);
  for (int64_t j = start; j < range.end; j += kLanes) {
    for (int r = 0; r < R; ++r) {
      const vfloat x = load(score + r * kBlock + j);
      const vfloat weight = exp2_normal(vmax(splat(kLowestExponent), x - splat(now[r])));
      const vfloat kept = select(x == lowest, splat(0.0f), weight);
      store(score + r * kBlock + j, kept);
      sum[r] += kept;
    }
  }
  for (int r = 0; r < R; ++r) {
    const bool same = now[r] == best[r] || best[r] == -__builtin_inff();
    factor[r] = same ? 1.0f : exp2_of(best[r] - now[r]);
    best[r] = now[r];
    mass[r] = mass[r] * factor[r] + sum_of_lanes(sum[r]);
  }
}

// acc += weight[j] * value[j] for R rows and V vectors, j ascending.
template <int R, int V>
inline void add_tile(const float* weight, const float* const* value, KeyRange range, int64_t width,
                     int64_t column, float* acc) {
  vfloat sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = load(acc + r * width + column + v * kLanes);
  }
  for (int64_t j = range.begin; j < range.end; ++j) {
    const float* x = value[j] + column;
    vfloat part[V];
    for (int v = 0; v < V; ++v) part[v] = load(x + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const vfloat w = broadcast(weight + r * kBlock + j);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(w, part[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(acc + r * width + column + v * kLanes, sum[r][v]);
  }
}

// As many accumulators as the registers hold.
template <int R, int kChunks>
inline void add_rows(const float* weight, const float* const* value, KeyRange range, int64_t width,
                     float* acc) {
  constexpr int kMost = R == 1 ? 8 : kLanes == 16 ? 4 : 2;
  constexpr int kVectors = kChunks > 0 && kChunks < kMost ? kChunks : kMost;
  if (range.empty()) return;
  int64_t column = 0;
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) {
    add_tile<R, kVectors>(weight, value, range, width, column, acc);
  }
  for (; column < width; column += kLanes) {
    add_tile<R, 1>(weight, value, range, width, column, acc);
  }
}

// Rows of a tile share the keys that all of them see; what only some see is added row by row, before and
// after, so every row meets its keys in ascending order.
template <int R, int kChunks>
inline void add_shared(const float* weight, const float* const* value, const KeyRange* range,
                       int64_t width, float* acc) {
  KeyRange shared = range[0];
  for (int r = 1; r < R; ++r) {
    shared = {larger(shared.begin, range[r].begin), smaller(shared.end, range[r].end)};
  }
  if (shared.empty()) {
    for (int r = 0; r < R; ++r) {
      add_rows<1, kChunks>(weight + r * kBlock, value, range[r], width, acc + r * width);
    }
    return;
  }
  for (int r = 0; r < R; ++r) {
    const KeyRange before = {range[r].begin, shared.begin};
    add_rows<1, kChunks>(weight + r * kBlock, value, before, width, acc + r * width);
  }
  add_rows<R, kChunks>(weight, value, shared, width, acc);
  for (int r = 0; r < R; ++r) {
    const KeyRange after = {shared.end, range[r].end};
    add_rows<1, kChunks>(weight + r * kBlock, value, after, width, acc + r * width);
  }
}

// The same of R rows with values of their own: those of row r lie `stride` elements after those of the row
// before it. `ahead(j)` is called at key j.
template <int R, int V, class Ahead>
inline void add_own_tile(const float* weight, const float* const* value, int64_t stride,
                         KeyRange range, int64_t width, int64_t column, float* acc,
                         const Ahead& ahead) {
  vfloat sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = load(acc + r * width + column + v * kLanes);
  }
  for (int64_t j = range.begin; j < range.end; ++j) {
    const float* x = value[j] + column;
    ahead(j);
    for (int r = 0; r < R; ++r) {
      const vfloat w = broadcast(weight + r * kBlock + j);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(w, load(x + r * stride + v * kLanes), sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(acc + r * width + column + v * kLanes, sum[r][v]);
  }
}

template <int R, int kChunks, class Ahead>
inline void add_own(const float* weight, const float* const* value, int64_t stride, KeyRange range,
                    int64_t width, float* acc, const Ahead& ahead) {
  constexpr int kMost = kLanes == 16 ? 16 / R : 8 / R;
  constexpr int kVectors = kChunks > 0 && kChunks < kMost ? kChunks : kMost;
  const auto nothing = [](int64_t) {};
  int64_t column = 0;
  if (kVectors * kLanes <= width) {
    add_own_tile<R, kVectors>(weight, value, stride, range, width, 0, acc, ahead);
    column = kVectors * kLanes;
  }
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) {
    add_own_tile<R, kVectors>(weight, value, stride, range, width, column, acc, nothing);
  }
  for (; column < width; column += kLanes) {
    add_own_tile<R, 1>(weight, value, stride, range, width, column, acc, nothing);
  }
}

template <int kChunks>
inline void add_values(const float* weight, const float* const* value, const KeyRange* range,
                       int64_t rows, int64_t width, float* acc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_shared<4, kChunks>(weight + r * kBlock, value, range + r, width, acc + r * width);
  }
  for (; r + 2 <= rows; r += 2) {
    add_shared<2, kChunks>(weight + r * kBlock, value, range + r, width, acc + r * width);
  }
  if (r < rows) {
    add_rows<1, kChunks>(weight + r * kBlock, value, range[r], width, acc + r * width);
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
