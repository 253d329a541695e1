// Two ways, by the number of rows. Few rows: dot products along k, kDots weight rows at a time, which
// read the weights once from whichever cache holds them. Otherwise x is turned into panels of kPairs rows:
// a vector of a panel holds two neighbouring k of each row, and is multiplied by two neighbouring k of a weight
// row in every pair of lanes, so nothing is summed across lanes but the two at the end. The weights are
// read as they lie; nothing of them is copied.
//
// A thread takes whole blocks of weight rows, so the bits do not depend on the number of threads. They
// do depend on which of the two ways is taken, and on nothing else outside the row.
#include "cpu/linear_small.h"

#include <stdlib.h>

#include "cpu/vec_math.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kFewRows = 5;  // from here on panels
constexpr int kDots = kLanes < 8 ? kLanes : 8;
constexpr int kPairs = kLanes / 2;  // pairs of lanes, and rows of a panel
constexpr int kSteps = 4;           // of k that a tile takes at a time
// Multiplications of a chunk: about 10 us of one core for few rows, less for many.
constexpr int64_t kChunk = 1 << 17;

// Loops over vectors that must stay in registers are unrolled in full; GCC leaves long ones rolled,
// with the vectors in memory.
#if defined(__clang__)
#define RLHF_FAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RLHF_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__clang__)
#define RLHF_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RLHF_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif

typedef int64_t vpair __attribute__((vector_size(kLanes * 4)));  // pairs of floats, moved as one

#if defined(__clang__)
#define RLHF_FAST_SHUFFLE_PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RLHF_FAST_SHUFFLE_PAIRS(a, b, ...) __builtin_shuffle(a, b, vpair{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__AVX512F__)
inline vfloat low_zip(vfloat a, vfloat b) {
  return RLHF_FAST_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline vfloat high_zip(vfloat a, vfloat b) {
  return RLHF_FAST_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline vpair low_zip(vpair a, vpair b) {
  return RLHF_FAST_SHUFFLE_PAIRS(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline vpair high_zip(vpair a, vpair b) {
  return RLHF_FAST_SHUFFLE_PAIRS(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif defined(__AVX2__)
inline vfloat low_zip(vfloat a, vfloat b) {
  return RLHF_FAST_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline vfloat high_zip(vfloat a, vfloat b) {
  return RLHF_FAST_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline vpair low_zip(vpair a, vpair b) { return RLHF_FAST_SHUFFLE_PAIRS(a, b, 0, 4, 1, 5); }
inline vpair high_zip(vpair a, vpair b) { return RLHF_FAST_SHUFFLE_PAIRS(a, b, 2, 6, 3, 7); }
#else
inline vfloat low_zip(vfloat a, vfloat b) { return RLHF_FAST_SHUFFLE(a, b, 0, 4, 1, 5); }
inline vfloat high_zip(vfloat a, vfloat b) { return RLHF_FAST_SHUFFLE(a, b, 2, 6, 3, 7); }
inline vpair low_zip(vpair a, vpair b) { return RLHF_FAST_SHUFFLE_PAIRS(a, b, 0, 2); }
inline vpair high_zip(vpair a, vpair b) { return RLHF_FAST_SHUFFLE_PAIRS(a, b, 1, 3); }
#endif

// a0 + a1, b0 + b1, a2 + a3, b2 + b3, ...
inline vfloat add_pairs(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_mask_moveldup_ps((__m512)a, 0xAAAA, (__m512)b) +
         (vfloat)_mm512_mask_movehdup_ps((__m512)b, 0x5555, (__m512)a);
#elif defined(__AVX2__)
  return RLHF_FAST_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
         RLHF_FAST_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#else
  return RLHF_FAST_SHUFFLE(a, b, 0, 4, 2, 6) + RLHF_FAST_SHUFFLE(a, b, 1, 5, 3, 7);
#endif
}

// Rows to columns: as many perfect shuffles as a number of an element has bits.
template <class Vector, int kCount>
inline void transpose(Vector (&rows)[kCount]) {
  RLHF_FAST_UNROLL
  for (int bit = 1; bit < kCount; bit *= 2) {
    Vector next[kCount];
    RLHF_FAST_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = low_zip(rows[i], rows[i + kCount / 2]);
      next[2 * i + 1] = high_zip(rows[i], rows[i + kCount / 2]);
    }
    RLHF_FAST_UNROLL
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

// The sums of kDots vectors, in order: each step halves both the vectors and the terms of a sum.
inline void add_each(vfloat (&sums)[kDots], float (&out)[kDots]) {
  RLHF_FAST_UNROLL
  for (int half = kDots / 2; half > 0; half /= 2) {
    RLHF_FAST_UNROLL
    for (int i = 0; i < half; ++i) {
      sums[i] = low_zip(sums[i], sums[i + half]) + high_zip(sums[i], sums[i + half]);
    }
  }
  for (int i = 0; i < kDots; ++i) {
    out[i] = sums[0][i];
    for (int more = i + kDots; more < kLanes; more += kDots) out[i] += sums[0][more];
  }
}

// The first `count` < kLanes elements, then zeros.
inline vfloat load_part(const float* address, int64_t count) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), address);
#else
  vfloat value = {};
  for (int64_t i = 0; i < count; ++i) value[i] = address[i];
  return value;
#endif
}

template <int kCount>
inline void write(const LinearSmallArgs& args, int64_t row, int64_t column, const float* sums) {
  float* out = args.out + row * args.out_stride + column;
  const int64_t left = args.columns - column;
  const int64_t count = left < kCount ? left : kCount;
  float y[kCount];
  std::memcpy(y, sums, sizeof(y));
  if (args.bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) y[i] += args.bias[column + i];
  }
  if (args.residual != nullptr) {
    const float* residual = args.residual + row * args.residual_stride + column;
    for (int64_t i = 0; i < count; ++i) y[i] += residual[i];
  }
  if (count == kCount) {
    std::memcpy(out, y, sizeof(y));
  } else {
    std::memcpy(out, y, count * sizeof(float));
  }
}

// Weight rows from `column`; those past the end repeat the last. Where none is past the end the
// addresses are multiples of the stride, which takes fewer registers than a pointer each.
template <int kRows, bool kWhole>
struct WeightRows {
  const float* base;
  int64_t stride;
  const float* row[kWhole ? 1 : kRows];

  WeightRows(const LinearSmallArgs& args, int64_t column)
      : base(args.weight + column * args.weight_stride), stride(args.weight_stride) {
    for (int j = 0; !kWhole && j < kRows; ++j) {
      row[j] = args.weight + smaller(column + j, args.columns - 1) * stride;
    }
  }
  const float* at(int j) const { return kWhole ? base + j * stride : row[j]; }
};

// ---- few rows ---------------------------------------------------------------------------------

// kRows rows of x from `row` with kDots weight rows from `column`.
template <int kRows, bool kWhole>
void dots(const LinearSmallArgs& args, int64_t row, int64_t column) {
  const WeightRows<kDots, kWhole> weight(args, column);
  const float* x = args.x + row * args.x_stride;
  vfloat sums[kRows][kDots] = {};
  int64_t k = 0;
  for (; k + kLanes <= args.inner; k += kLanes) {
    vfloat of_x[kRows];
    RLHF_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) of_x[r] = load(x + r * args.x_stride + k);
    RLHF_FAST_UNROLL
    for (int j = 0; j < kDots; ++j) {
      const vfloat w = load(weight.at(j) + k);
      RLHF_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][j] = fma(w, of_x[r], sums[r][j]);
    }
  }
  if (k < args.inner) {
    RLHF_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const vfloat of_x = load_part(x + r * args.x_stride + k, args.inner - k);
      RLHF_FAST_UNROLL
      for (int j = 0; j < kDots; ++j) {
        sums[r][j] = fma(load_part(weight.at(j) + k, args.inner - k), of_x, sums[r][j]);
      }
    }
  }
  RLHF_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float total[kDots];
    add_each(sums[r], total);
    write<kDots>(args, row + r, column, total);
  }
}

template <bool kWhole>
void few_rows(const LinearSmallArgs& args, int64_t column) {
  int64_t row = 0;
  for (; row + 2 <= args.rows; row += 2) dots<2, kWhole>(args, row, column);
  if (row < args.rows) dots<1, kWhole>(args, row, column);
}

// ---- panels -----------------------------------------------------------------------------------

// Memory of the calling thread for the panels of x; grows and stays.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { free(data); }
  float* reserve(int64_t wanted) {
    if (wanted > size) {
      free(data);
      data = static_cast<float*>(malloc(wanted * sizeof(float)));
      size = data == nullptr ? 0 : wanted;
    }
    return data;
  }
};

inline int64_t panel_size(const LinearSmallArgs& args) { return (args.inner + 1) / 2 * kLanes; }

// [rows, inner] as panels [inner / 2, kPairs, 2]; rows and a last k that do not exist are 0.
void pack(const LinearSmallArgs& args, float* panels) {
  for (int64_t first = 0; first < args.rows; first += kPairs) {
    const float* x = args.x + first * args.x_stride;
    const int64_t rows = smaller(kPairs, args.rows - first);
    float* panel = panels + first / kPairs * panel_size(args);
    for (int64_t k = 0; k < args.inner; k += kLanes) {
      const int64_t count = smaller(kLanes, args.inner - k);
      vpair tile[kPairs] = {};
      RLHF_FAST_UNROLL
      for (int r = 0; r < kPairs; ++r) {
        if (r >= rows) break;
        const float* source = x + r * args.x_stride + k;
        tile[r] = (vpair)(count == kLanes ? load(source) : load_part(source, count));
      }
      transpose(tile);
      RLHF_FAST_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        if (2 * i < count) store(panel + (k / 2 + i) * kLanes, (vfloat)tile[i]);
      }
    }
  }
}

// Two neighbouring k in every pair of lanes.
inline vfloat broadcast_pair(const float* address) {
#if defined(__AVX512F__)
  double pair;
  std::memcpy(&pair, address, sizeof(pair));
  return (vfloat)_mm512_set1_pd(pair);
#else
  int64_t pair;
  std::memcpy(&pair, address, sizeof(pair));
  return (vfloat)(vpair{} + pair);
#endif
}

// Asks for the weight rows of the next block, a line at a time beside the products: rows lie too far apart for
// the processor's own prefetching, without which weights from the third-level cache halved the speed.
struct Ahead {
  const float* base;
  int64_t stride;

  static constexpr int kFloats = 64 / sizeof(float);  // of a line

  // Of kRows rows at each multiple of kSteps; after kFloats of k every row was met.
  template <int kRows>
  void fetch(int64_t k) const {
    constexpr int kEach = kRows * kSteps / kFloats > 0 ? kRows * kSteps / kFloats : 1;
    const int64_t first = k % kFloats / kSteps * kEach;
    RLHF_FAST_UNROLL
    for (int j = 0; j < kEach; ++j) {
      if (first + j < kRows) __builtin_prefetch(base + (first + j) * stride + k, 0, 2);
    }
  }
};

// kPanels panels from `panel` with kLanes / kPanels weight rows from `column`.
template <int kPanels, bool kWhole, bool kFetch>
void tile_of_panels(const LinearSmallArgs& args, const float* panel, int64_t row, int64_t column,
                    const Ahead& ahead) {
  constexpr int kRows = kLanes / kPanels;
  const int64_t size = panel_size(args);
  const WeightRows<kRows, kWhole> weight(args, column);
  vfloat sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kSteps <= args.inner; k += kSteps) {  // an address serves that many products
    if (kFetch) ahead.fetch<kRows>(k);
    RLHF_FAST_UNROLL
    for (int u = 0; u < kSteps; u += 2) {
      vfloat x[kPanels];
      RLHF_FAST_UNROLL
      for (int p = 0; p < kPanels; ++p) x[p] = load(panel + p * size + (k + u) / 2 * kLanes);
      RLHF_FAST_UNROLL
      for (int j = 0; j < kRows; ++j) {
        const vfloat w = broadcast_pair(weight.at(j) + k + u);
        RLHF_FAST_UNROLL
        for (int p = 0; p < kPanels; ++p) sums[p * kRows + j] = fma(w, x[p], sums[p * kRows + j]);
      }
    }
  }
  for (; k < args.inner; k += 2) {
    RLHF_FAST_UNROLL
    for (int j = 0; j < kRows; ++j) {
      const float* at = weight.at(j) + k;
      const float pair[2] = {at[0], k + 1 < args.inner ? at[1] : 0.0f};
      const vfloat w = broadcast_pair(pair);
      RLHF_FAST_UNROLL
      for (int p = 0; p < kPanels; ++p) {
        const vfloat x = load(panel + p * size + k / 2 * kLanes);
        sums[p * kRows + j] = fma(w, x, sums[p * kRows + j]);
      }
    }
  }
  vpair folded[kPairs];
  RLHF_FAST_UNROLL
  for (int i = 0; i < kPairs; ++i) folded[i] = (vpair)add_pairs(sums[2 * i], sums[2 * i + 1]);
  transpose(folded);
  RLHF_FAST_UNROLL
  for (int r = 0; r < kPairs; ++r) {
    float totals[kLanes];
    store(totals, (vfloat)folded[r]);
    for (int p = 0; p < kPanels; ++p) {
      const int64_t at = row + p * kPairs + r;
      if (at < args.rows) write<kRows>(args, at, column, totals + p * kRows);
    }
  }
}

template <int kPanels, bool kWhole>
void panels_of_block(const LinearSmallArgs& args, const float* panel, int64_t row, int64_t column,
                     bool fetch) {
  constexpr int kRows = kLanes / kPanels;
  for (int64_t j = 0; j < kLanes && column + j < args.columns; j += kRows) {
    const Ahead ahead = {args.weight + (column + kLanes + j) * args.weight_stride,
                         args.weight_stride};
    if (fetch) {
      tile_of_panels<kPanels, kWhole, true>(args, panel, row, column + j, ahead);
    } else {
      tile_of_panels<kPanels, kWhole, false>(args, panel, row, column + j, ahead);
    }
  }
}

// kLanes weight rows from `column` with all panels. Two panels share what is read of a weight row.
template <bool kWhole>
void many_rows(const LinearSmallArgs& args, const float* panels, int64_t column) {
  const bool more = column + 2 * kLanes <= args.columns;
  int64_t row = 0;
  for (; row + kPairs < args.rows; row += 2 * kPairs) {
    const float* panel = panels + row / kPairs * panel_size(args);
    panels_of_block<2, kWhole>(args, panel, row, column, more && row == 0);
  }
  if (row < args.rows) {
    const float* panel = panels + row / kPairs * panel_size(args);
    panels_of_block<1, kWhole>(args, panel, row, column, more && row == 0);
  }
}

// Blocks of `width` weight rows, as chunks for the threads.
template <class Whole, class Part>
void for_blocks(const LinearSmallArgs& args, int64_t width, const Whole& whole, const Part& part) {
  const int64_t blocks = (args.columns + width - 1) / width;
  const int64_t grain = larger(1, kChunk / larger(1, width * args.inner * args.rows));
  parallel_for(blocks, grain, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block * width;
      if (column + width <= args.columns) {
        whole(column);
      } else {
        part(column);
      }
    }
  });
}

}  // namespace

void linear_small(const LinearSmallArgs& args) {
  float* panels = nullptr;
  if (larger(args.rows, args.of_rows) >= kFewRows) {
    static thread_local Scratch scratch;
    const int64_t count = (args.rows + kPairs - 1) / kPairs;
    panels = scratch.reserve(larger(1, count * panel_size(args)));
  }
  if (panels == nullptr) {  // or no memory for them
    for_blocks(
        args, kDots, [&args](int64_t column) { few_rows<true>(args, column); },
        [&args](int64_t column) { few_rows<false>(args, column); });
    return;
  }
  pack(args, panels);
  for_blocks(
      args, kLanes, [&args, panels](int64_t column) { many_rows<true>(args, panels, column); },
      [&args, panels](int64_t column) { many_rows<false>(args, panels, column); });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
