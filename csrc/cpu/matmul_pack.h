// Rows and columns of fp32 as tiles of bf16, three parts of each number: what `matmul` multiplies.
#pragma once

#include "cpu/vec.h"
#include "host/cpu_features.h"

#if defined(__AVX512F__) && defined(RLHF_FAST_TILES)
#include <immintrin.h>

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr int64_t kTile = 16;               // rows and columns of a tile of fp32
constexpr int64_t kDepth = 32;              // bf16 numbers in a row of a tile
constexpr int64_t kPanel = 2 * kTile;       // rows of a and columns of b of a block of the result
constexpr int64_t kTileDwords = 256;        // 1 KiB
constexpr int64_t kStep = 3 * 2 * kTileDwords;  // of a panel: 32 along inner, as three parts of two tiles
constexpr int64_t kGroup = 4;               // panels of b that are packed together

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
inline void pack_panels(const Lines* lines, int64_t panels, const uint32_t* skip, uint32_t* packed,
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
constexpr uint32_t kNoNearest = 0x7F7F8000, kInfinite = 0x7F800000;

// Lines of a panel, one bit each, whose numbers cannot be split: packed as zeros. `nan`: those with a NaN.
struct Skipped {
  uint32_t all = 0, nan = 0;
};

inline Skipped skipped_of(const Lines& lines) {
  Skipped found;
  for (int64_t i = 0; i < lines.count; ++i) {
    const uint32_t bit = 1u << i;
    for (int64_t k = 0; k < lines.depth && !(found.nan & bit); ++k) {
      uint32_t bits;
      std::memcpy(&bits, lines.at(i, k), sizeof(bits));
      bits &= 0x7FFFFFFF;
      if (bits >= kNoNearest) found.all |= bit;
      if (bits > kInfinite) found.nan |= bit;
    }
  }
  return found;
}

// Packs up to kGroup panels.
inline void pack(const Lines* lines, int64_t panels, uint32_t* packed, int64_t panel_size,
                 Skipped* skipped) {
  __m512 seen[kGroup];
  uint32_t none[kGroup] = {};
  for (int64_t p = 0; p < panels; ++p) {
    seen[p] = _mm512_setzero_ps();
    skipped[p] = {};
  }
  pack_panels(lines, panels, none, packed, panel_size, seen);
  for (int64_t p = 0; p < panels; ++p) {
    if (_mm512_cmp_ps_mask(seen[p], seen[p], _CMP_UNORD_Q) == 0) continue;
    skipped[p] = skipped_of(lines[p]);
    pack_panels(lines + p, 1, &skipped[p].all, packed + p * panel_size, panel_size, seen + p);
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast

#endif
