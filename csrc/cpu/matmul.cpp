// fp32 products of bf16 tiles. A number of fp32 is the exact sum of three of bf16, each the nearest to what
// is left: x = h + m + l. Of the nine products of two such sums six are taken,
//
//     a b = ah bh + ah bm + am bh + ah bl + am bm + al bh        (left out: at most 2^-23 of a b)
//
// each exact in fp32, where the unit adds them up. It multiplies bf16 sixteen times as fast as the vector units
// multiply fp32, so six products for one still gain.
//
// Panels of 32 rows of a and of 32 columns of b are split into tiles of 16 x 32: a dword holds elements j and
// j + 16 of 32 along `inner`, in both, which orders a sum and changes nothing else. Parts of b that fit
// the second-level cache are packed by all threads together; then each takes panels of a.
//
// A row's result does not depend on the rows beside it nor on the number of threads. Subnormal numbers
// count as zero, as the unit has it, and a number below 2^-110 loses its last digits. Rows of a and columns
// of b with inf, NaN or what bf16 rounds to inf, whose parts would make NaN, are multiplied in fp32.
#include "cpu/matmul.h"

#include "cpu/vec.h"
#include "host/parallel.h"

#if defined(__AVX512F__) && defined(RLHF_FAST_TILES)
#include <immintrin.h>

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kTile = 16;               // rows and columns of a tile of fp32
constexpr int64_t kDepth = 32;              // bf16 numbers in a row of a tile
constexpr int64_t kPanel = 2 * kTile;       // rows of a and columns of b of a block of the result
constexpr int64_t kTileDwords = 256;        // 1 KiB
constexpr int64_t kStep = 3 * 2 * kTileDwords;  // of a panel: 32 along inner, as three parts of two tiles
constexpr int64_t kInner = 256;             // of a panel at most: 48 KiB
constexpr int64_t kGroup = 4;               // panels of b that are packed together
constexpr int64_t kStepsOfB = 128;          // packed at a time: 768 KiB, less than a second-level cache

static_assert(kMatmulScratch == kStepsOfB * (kStep + 1) * 4, "lines that are skipped: a word a panel");

// ---- splitting ----------------------------------------------------------------------------------

struct Parts {
  __m512i high, middle, low;
};

// To the nearest number of bf16. Truncated parts would have the sign of x, all of them, and what is left out
// of a product would add up.
inline __m512i nearest(__m512 x) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(up, _mm512_set1_epi32(0xFFFF0000));
}

// Exact: each difference has as many bits less as were taken off.
inline Parts split(__m512 x) {
  Parts parts;
  parts.high = nearest(x);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(parts.high));
  parts.middle = nearest(rest);
  parts.low = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(parts.middle)));
  return parts;
}

// The upper halves of two vectors as pairs.
inline __m512i pairs(__m512i first, __m512i second) {
  const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
  // (second & upper) | first >> 16
  return _mm512_ternarylogic_epi32(upper, second, _mm512_srli_epi32(first, 16), 0xEA);
}

// Columns to rows, of dwords.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i ab = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    const __m512i AB = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i cd = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
    const __m512i CD = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(ab, cd);
    t[i + 1] = _mm512_unpackhi_epi64(ab, cd);
    t[i + 2] = _mm512_unpacklo_epi64(AB, CD);
    t[i + 3] = _mm512_unpackhi_epi64(AB, CD);
  }
  // t[4 g + c], lane of 128 bits q: column 4 q + c of rows 4 g ... 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i p = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);       // q 0, 2 of g 0 and 1
    const __m512i q = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xDD);       // q 1, 3
    const __m512i u = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);  // of g 2 and 3
    const __m512i v = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xDD);
    r[c] = _mm512_shuffle_i32x4(p, u, 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(p, u, 0xDD);
    r[4 + c] = _mm512_shuffle_i32x4(q, v, 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(q, v, 0xDD);
  }
}

// A vector of pairs of each part into its tile; tiles of one part lie side by side. Returns the sum of
// the last parts, which is NaN if one of the numbers is inf or NaN.
inline __m512 put(uint32_t* tile, __m512 first, __m512 second) {
  const Parts x = split(first), y = split(second);
  _mm512_store_si512(tile, pairs(x.high, y.high));
  _mm512_store_si512(tile + 2 * kTileDwords, pairs(x.middle, y.middle));
  _mm512_store_si512(tile + 4 * kTileDwords, pairs(x.low, y.low));
  return _mm512_add_ps(_mm512_castsi512_ps(x.low), _mm512_castsi512_ps(y.low));
}

inline void transpose_tile(uint32_t* tile) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + 16 * i);
  transpose(rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 16 * i, rows[i]);
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Up to 32 lines of one operand, rows of a or columns of b, of `inner` elements each.
struct Lines {
  const float* data;
  int64_t line, inner;  // strides; one is 1
  int64_t count, depth;
  bool pairs_down;  // the right operand: pairs of elements of a line lie below each other

  const float* at(int64_t i, int64_t k) const { return data + i * line + k * inner; }
};

// One tile of each part: 16 lines from `first` on, 32 elements from `k` on; lines of `skip` as zeros.
// Where elements of a line are adjacent a vector is a part of a line; otherwise it is one element of
// each line.
inline __m512 pack_tile(const Lines& lines, int64_t first, int64_t k, uint32_t skip, uint32_t* tile) {
  __m512 seen = _mm512_setzero_ps();
  const int64_t depth = lines.depth - k;
  const __mmask16 present = first_lanes(lines.count - first) & ~(skip >> first);
  if (lines.inner == 1) {
    const __mmask16 front = first_lanes(depth), back = first_lanes(depth - kTile);
    for (int i = 0; i < kTile; ++i) {
      const bool here = present >> i & 1;
      const float* at = lines.at(first + i, k);
      seen = _mm512_add_ps(seen, put(tile + i * kTile, _mm512_maskz_loadu_ps(here ? front : 0, at),
                                     _mm512_maskz_loadu_ps(here ? back : 0, at + kTile)));
    }
  } else {
    for (int i = 0; i < kTile; ++i) {
      const float* at = lines.at(first, k + i);
      seen = _mm512_add_ps(
          seen, put(tile + i * kTile, _mm512_maskz_loadu_ps(i < depth ? present : 0, at),
                    _mm512_maskz_loadu_ps(i + kTile < depth ? present : 0,
                                          at + kTile * lines.inner)));
    }
  }
  if ((lines.inner != 1) != lines.pairs_down) {
    for (int part = 0; part < 3; ++part) transpose_tile(tile + part * 2 * kTileDwords);
  }
  return seen;
}

// Step by step through all panels: where lines are columns of memory, a row of it is read while
// it is in the cache.
void pack_panels(const Lines* lines, int64_t panels, const uint32_t* skip, uint32_t* packed,
                 int64_t panel_size, __m512* seen) {
  for (int64_t k = 0; k < lines->depth; k += kDepth, packed += kStep) {
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t half = 0; half < 2; ++half) {
        const __m512 found = pack_tile(lines[p], half * kTile, k, skip[p],
                                       packed + p * panel_size + half * kTileDwords);
        seen[p] = _mm512_add_ps(seen[p], found);
      }
    }
  }
}

// From here on, in bits, the nearest number of bf16 is inf; then come inf and NaN themselves.
constexpr uint32_t kNoNearest = 0x7F7F8000;

// Packs up to kGroup panels; `skip`: of each, the lines that have such numbers, which it holds as zeros.
void pack(const Lines* lines, int64_t panels, uint32_t* packed, int64_t panel_size, uint32_t* skip) {
  __m512 seen[kGroup];
  for (int64_t p = 0; p < panels; ++p) {
    seen[p] = _mm512_setzero_ps();
    skip[p] = 0;
  }
  pack_panels(lines, panels, skip, packed, panel_size, seen);
  for (int64_t p = 0; p < panels; ++p) {
    if (_mm512_cmp_ps_mask(seen[p], seen[p], _CMP_UNORD_Q) == 0) continue;
    for (int64_t i = 0; i < lines[p].count; ++i) {
      for (int64_t k = 0; k < lines[p].depth; ++k) {
        uint32_t bits;
        std::memcpy(&bits, lines[p].at(i, k), sizeof(bits));
        if ((bits & 0x7FFFFFFF) >= kNoNearest) skip[p] |= 1u << i;
      }
    }
    pack_panels(lines + p, 1, skip + p, packed + p * panel_size, panel_size, seen + p);
  }
}

// ---- multiplying --------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A block of the result, and what is added to it: nothing, another matrix, or what stands there.
// `turned`: out and add are of the product's transpose.
struct Target {
  float* out;
  int64_t out_row;
  const float* add;
  int64_t add_row;
  int64_t rows, columns;
  bool turned;

  float* out_at(int64_t i, int64_t j) const {
    return turned ? out + j * out_row + i : out + i * out_row + j;
  }
  const float* add_at(int64_t i, int64_t j) const {
    return turned ? add + j * add_row + i : add + i * add_row + j;
  }
};

// 32 x 32 numbers, turned.
inline void transpose_block(float* block) {
  alignas(64) float turned[kPanel * kPanel];
  for (int64_t i = 0; i < kPanel; i += kTile) {
    for (int64_t j = 0; j < kPanel; j += kTile) {
      __m512i rows[16];
      for (int64_t r = 0; r < kTile; ++r) rows[r] = _mm512_load_si512(block + (i + r) * kPanel + j);
      transpose(rows);
      for (int64_t r = 0; r < kTile; ++r) _mm512_store_si512(turned + (j + r) * kPanel + i, rows[r]);
    }
  }
  std::memcpy(block, turned, sizeof(turned));
}

#define RLHF_FAST_LOAD_A(part)                           \
  _tile_loadd(4, a + 2 * (part) * kTileDwords, 64);      \
  if (two_rows) _tile_loadd(5, a + (2 * (part) + 1) * kTileDwords, 64)
#define RLHF_FAST_LOAD_B(part)                      \
  _tile_loadd(6, b + 2 * (part) * kTileDwords, 64); \
  _tile_loadd(7, b + (2 * (part) + 1) * kTileDwords, 64)
#define RLHF_FAST_MULTIPLY()  \
  _tile_dpbf16ps(0, 4, 6);    \
  _tile_dpbf16ps(1, 4, 7);    \
  if (two_rows) {             \
    _tile_dpbf16ps(2, 5, 6);  \
    _tile_dpbf16ps(3, 5, 7);  \
  }

// 32 x 32 of the result, or less. The products of leading parts come last, over all of inner: a sum
// is rounded at each step, and the smaller ones are not to be rounded at the size of the result.
// A turned product takes the five smaller ones in the other order, which is the same order for a and b.
RLHF_FAST_TILES void multiply(const uint32_t* a, const uint32_t* b, int64_t steps,
                              const Target& target) {
  const bool two_rows = target.rows > kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint32_t *const first_a = a, *const first_b = b;
  if (target.turned) {
    for (int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
      RLHF_FAST_LOAD_A(2);
      RLHF_FAST_LOAD_B(0);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_A(1);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_B(1);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_A(0);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_B(2);
      RLHF_FAST_MULTIPLY()
    }
  } else {
    for (int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
      RLHF_FAST_LOAD_A(0);
      RLHF_FAST_LOAD_B(2);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_B(1);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_A(1);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_B(0);
      RLHF_FAST_MULTIPLY()
      RLHF_FAST_LOAD_A(2);
      RLHF_FAST_MULTIPLY()
    }
  }
  a = first_a;
  b = first_b;
  for (int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
    RLHF_FAST_LOAD_A(0);
    RLHF_FAST_LOAD_B(0);
    RLHF_FAST_MULTIPLY()
  }
  const bool whole = target.rows == kPanel && target.columns == kPanel;
  if (whole && target.add == nullptr && !target.turned) {
    const int64_t row = target.out_row * 4;
    _tile_stored(0, target.out, row);
    _tile_stored(1, target.out + kTile, row);
    _tile_stored(2, target.out + kTile * target.out_row, row);
    _tile_stored(3, target.out + kTile * target.out_row + kTile, row);
    return;
  }
  alignas(64) float block[kPanel * kPanel];
  _tile_stored(0, block, kPanel * 4);
  _tile_stored(1, block + kTile, kPanel * 4);
  _tile_stored(2, block + kTile * kPanel, kPanel * 4);
  _tile_stored(3, block + kTile * kPanel + kTile, kPanel * 4);
  if (target.turned) transpose_block(block);
  const int64_t rows = target.turned ? target.columns : target.rows;
  const int64_t columns = target.turned ? target.rows : target.columns;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kTile) {
      const __mmask16 lanes = first_lanes(columns - j);
      __m512 sum = _mm512_load_ps(block + i * kPanel + j);
      if (target.add != nullptr) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, target.add + i * target.add_row + j));
      }
      _mm512_mask_storeu_ps(target.out + i * target.out_row + j, lanes, sum);
    }
  }
}

// Results of rows and columns that were packed as zeros, in fp32.
class Exceptions {
 public:
  // Before the others are written: out may be what is added.
  Exceptions(const Lines& a, const Lines& b, uint32_t rows, uint32_t columns, const Target& target)
      : rows_(rows), columns_(columns), target_(target) {
    each([&](int64_t i, int64_t j, float& value) {
      float sum = 0.0f;
      for (int64_t k = 0; k < a.depth; ++k) sum += *a.at(i, k) * *b.at(j, k);
      value = target.add == nullptr ? sum : sum + *target.add_at(i, j);
    });
  }

  void write() {
    each([this](int64_t i, int64_t j, float& value) { *target_.out_at(i, j) = value; });
  }

 private:
  template <class Visit>
  void each(const Visit& visit) {
    for (int64_t i = 0; i < target_.rows; ++i) {
      for (int64_t j = 0; j < target_.columns; ++j) {
        if ((rows_ >> i | columns_ >> j) & 1) visit(i, j, values_[i * kPanel + j]);
      }
    }
  }

  uint32_t rows_, columns_;
  const Target& target_;
  float values_[kPanel * kPanel];
};

// ---- parts of the problem -----------------------------------------------------------------------

struct Chunk {
  const MatmulArgs& args;
  int64_t begin, inner;           // along inner
  int64_t first_column, columns;  // of b
  int64_t steps;
  uint32_t* b;
  uint32_t* skipped;  // of every panel of b
  bool turned;        // out and add are of the product's transpose

  Lines rows_at(int64_t row) const {
    return {args.a + row * args.a_row + begin * args.a_inner,
            args.a_row, args.a_inner, smaller(kPanel, args.rows - row), inner, false};
  }
  Lines columns_at(int64_t column) const {
    const int64_t at = first_column + column;
    return {args.b + begin * args.b_inner + at * args.b_column,
            args.b_column, args.b_inner, smaller(kPanel, columns - column), inner, true};
  }
  uint32_t* panel(int64_t column) const { return b + column / kPanel * steps * kStep; }
};

void pack_b(const Chunk& chunk, int64_t group) {
  const int64_t begin = group * kGroup * kPanel;
  const int64_t panels = smaller(kGroup, (chunk.columns - begin + kPanel - 1) / kPanel);
  Lines lines[kGroup];
  for (int64_t p = 0; p < panels; ++p) lines[p] = chunk.columns_at(begin + p * kPanel);
  pack(lines, panels, chunk.panel(begin), chunk.steps * kStep, chunk.skipped + group * kGroup);
}

RLHF_FAST_TILES void multiply_panel(const Chunk& chunk, int64_t row) {
  const MatmulArgs& args = chunk.args;
  alignas(64) uint32_t a[kInner / kDepth * kStep];
  const Lines rows = chunk.rows_at(row);
  uint32_t skipped;
  pack(&rows, 1, a, 0, &skipped);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t column = 0; column < chunk.columns; column += kPanel) {
    const int64_t at = chunk.first_column + column;
    Target target = {args.out,   args.out_row, args.add,
                     args.add_row, rows.count, smaller(kPanel, chunk.columns - column), chunk.turned};
    target.out = target.out_at(row, at);
    if (args.add != nullptr) target.add = target.add_at(row, at);
    if (chunk.begin > 0) {  // what came before stands there
      target.add = target.out;
      target.add_row = target.out_row;
    }
    const uint32_t also = chunk.skipped[column / kPanel];
    if ((skipped | also) == 0) {
      multiply(a, chunk.panel(column), chunk.steps, target);
    } else {
      Exceptions exceptions(rows, chunk.columns_at(column), skipped, also, target);
      multiply(a, chunk.panel(column), chunk.steps, target);
      exceptions.write();
    }
  }
  _tile_release();
}

// out^T = b^T a^T where that is cheaper: turning the parts of an operand costs three times what turning
// the result does.
bool turn(const MatmulArgs& args, MatmulArgs& other) {
  const bool turns_a = args.a_inner != 1, turns_b = args.b_inner == 1;
  if (turns_a == turns_b || (args.add != nullptr && args.add_row == 0)) return false;
  const int64_t now = turns_a ? args.rows : args.columns;
  const int64_t then = turns_a ? args.columns : args.rows;
  if (3 * args.inner * now <= 3 * args.inner * then + args.rows * args.columns) return false;
  other = args;
  other.rows = args.columns;
  other.columns = args.rows;
  other.a = args.b;
  other.a_row = args.b_column;
  other.a_inner = args.b_inner;
  other.b = args.a;
  other.b_column = args.a_row;
  other.b_inner = args.a_inner;
  return true;
}

void multiply_all(const MatmulArgs& args, bool turned) {
  const int64_t deepest = smaller(kInner, larger(args.inner, 1));
  const int64_t panels = kStepsOfB / ((deepest + kDepth - 1) / kDepth);
  const int64_t width = smaller(panels * kPanel, (args.columns + kPanel - 1) / kPanel * kPanel);
  uint32_t* memory = static_cast<uint32_t*>(args.scratch);
  uint32_t* skipped = memory + kStepsOfB * kStep;
  int64_t begin = 0;
  do {
    const int64_t inner = smaller(kInner, args.inner - begin);
    for (int64_t column = 0; column < args.columns; column += width) {
      const int64_t columns = smaller(width, args.columns - column);
      const Chunk chunk = {args, begin, inner, column, columns, (inner + kDepth - 1) / kDepth,
                           memory, skipped, turned};
      constexpr int64_t kTogether = kGroup * kPanel;
      parallel_for((columns + kTogether - 1) / kTogether, 1, args.threads,
                   [&chunk](int64_t from, int64_t to) {
                     for (int64_t group = from; group < to; ++group) pack_b(chunk, group);
                   });
      parallel_for((args.rows + kPanel - 1) / kPanel, 1, args.threads,
                   [&chunk](int64_t from, int64_t to) {
                     for (int64_t i = from; i < to; ++i) multiply_panel(chunk, i * kPanel);
                   });
    }
    begin += kInner;
  } while (begin < args.inner);
}

}  // namespace

void matmul(const MatmulArgs& args) {
  if (args.rows <= 0 || args.columns <= 0) return;
  MatmulArgs other;
  if (turn(args, other)) {
    multiply_all(other, true);
  } else {
    multiply_all(args, false);
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast

#else

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void matmul(const MatmulArgs&) {}  // tiles_usable() is false here

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast

#endif
