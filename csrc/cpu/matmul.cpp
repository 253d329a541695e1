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
// Results within 1 % of the largest number of fp32 may overflow.
#include "cpu/matmul.h"

#include "cpu/matmul_pack.h"
#include "cpu/vec.h"
#include "host/parallel.h"

#if defined(__AVX512F__) && defined(RLHF_FAST_TILES)

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kInner = 256;             // of a panel at most: 48 KiB
constexpr int64_t kStepsOfB = 128;          // packed at a time: 768 KiB, less than a second-level cache

static_assert(kMatmulScratch == kStepsOfB * (kStep + 2) * 4, "what is skipped: two words a panel");

// ---- multiplying --------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A block of the result, and what is added to it, if anything.
// `turned`: out and add are of the product's transpose.
struct Target {
  float* out;
  int64_t out_row;
  const float* add;
  int64_t add_row;
  int64_t rows, columns;
  bool turned;
  bool first;  // otherwise what came before stands in out

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

// All products of parts but that of the leading ones.
#define RLHF_FAST_SMALLER(LOAD_FIRST, LOAD_SECOND) \
  LOAD_FIRST(0);                                   \
  LOAD_SECOND(2);                                  \
  RLHF_FAST_MULTIPLY()                             \
  LOAD_SECOND(1);                                  \
  RLHF_FAST_MULTIPLY()                             \
  LOAD_FIRST(1);                                   \
  RLHF_FAST_MULTIPLY()                             \
  LOAD_SECOND(0);                                  \
  RLHF_FAST_MULTIPLY()                             \
  LOAD_FIRST(2);                                   \
  RLHF_FAST_MULTIPLY()

// 32 x 32 of the result, or less. The products of leading parts come last, over all of inner: a sum
// is rounded at each step, and the smaller ones are not to be rounded at the size of the result.
// A turned product has a and b in each other's place, and takes the smaller ones in the same order of them.
RLHF_FAST_TILES void multiply(const uint32_t* a, const uint32_t* b, int64_t steps,
                              const Target& target) {
  const bool two_rows = target.rows > kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint32_t *const first_a = a, *const first_b = b;
  for (int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
    if (target.turned) {
      RLHF_FAST_SMALLER(RLHF_FAST_LOAD_B, RLHF_FAST_LOAD_A)
    } else {
      RLHF_FAST_SMALLER(RLHF_FAST_LOAD_A, RLHF_FAST_LOAD_B)
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
  if (whole && target.first && target.add == nullptr && !target.turned) {
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
      float* out = target.out + i * target.out_row + j;
      if (!target.first) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, out), sum);
      if (target.add != nullptr) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, target.add + i * target.add_row + j));
      }
      _mm512_mask_storeu_ps(out, lanes, sum);
    }
  }
}

// Results of rows and columns that were packed as zeros, in fp32. Those of a line with a NaN are NaN: in a
// gradient of weights one token with a NaN has one in every row.
class Exceptions {
 public:
  // Before the others are written: out may be what is added.
  Exceptions(const Lines& a, const Lines& b, Skipped rows, Skipped columns, const Target& target)
      : rows_(rows.all), columns_(columns.all), target_(target) {
    each([&](int64_t i, int64_t j, float& value) {
      const bool nan = (rows.nan >> i | columns.nan >> j) & 1;
      float sum = nan ? __builtin_nanf("") : product(a, i, b, j);
      if (!target.first) sum += *target.out_at(i, j);
      value = target.add == nullptr ? sum : sum + *target.add_at(i, j);
    });
  }

  void write() {
    each([this](int64_t i, int64_t j, float& value) { *target_.out_at(i, j) = value; });
  }

 private:
  static float product(const Lines& a, int64_t i, const Lines& b, int64_t j) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i of_a = _mm512_mullo_epi32(index, _mm512_set1_epi32(static_cast<int>(a.inner)));
    const __m512i of_b = _mm512_mullo_epi32(index, _mm512_set1_epi32(static_cast<int>(b.inner)));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < a.depth; k += kTile) {
      const __mmask16 lanes = first_lanes(a.depth - k);
      const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, of_a, a.at(i, k), 4);
      const __m512 y = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, of_b, b.at(j, k), 4);
      sum = _mm512_fmadd_ps(x, y, sum);
    }
    return _mm512_reduce_add_ps(sum);
  }

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
  Skipped* skipped;  // of every panel of b
  bool turned;       // out and add are of the product's transpose

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
  Skipped skipped;
  pack(&rows, 1, a, 0, &skipped);
  const TileConfig config;
  // The loads of tiles say nothing to the compiler of the memory that they read.
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);
  for (int64_t column = 0; column < chunk.columns; column += kPanel) {
    const int64_t at = chunk.first_column + column;
    Target target = {args.out,     args.out_row, args.add,
                     args.add_row, rows.count,   smaller(kPanel, chunk.columns - column),
                     chunk.turned, chunk.begin == 0};
    target.out = target.out_at(row, at);
    if (args.add != nullptr) target.add = target.add_at(row, at);
    // What is added comes last, unless out is it: then it is what the sum begins with.
    if (args.add == args.out ? chunk.begin > 0 : chunk.begin + chunk.inner < args.inner) {
      target.add = nullptr;
    }
    const Skipped also = chunk.skipped[column / kPanel];
    if ((skipped.all | also.all) == 0) {
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
  Skipped* skipped = reinterpret_cast<Skipped*>(memory + kStepsOfB * kStep);
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
