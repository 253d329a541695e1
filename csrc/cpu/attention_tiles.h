// What attention over packed segments is made of: rows brought into tiles of kTile tokens, one kernel for
// every matrix product among them, and tasks shared among threads.
//
// Tiles are fp32, `width` columns (head_dim rounded up to whole vectors, zeros behind) or kTile columns.
// Every sum is a chain of fma in ascending order, whatever the shape of the registers' tile: its bits
// depend on its terms alone.
#pragma once

#include <cstdlib>

#include "cpu/attention_sums.h"
#include "cpu/packed_attention.h"
#include "cpu/vec_some.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

constexpr int64_t kTile = kBlock;  // tokens
constexpr int64_t kStrip = 8;      // rows that are trimmed to what they see together
constexpr double kLog2OfE = 1.4426950408889634;
constexpr float kLn2 = 0.69314718f;
// Products below which waking a second thread costs more than it saves (about 10 us).
constexpr int64_t kAlone = 1 << 19;

inline int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

inline bool is_same(vfloat a, vfloat b) {
  const vint differs = as_bits(a) ^ as_bits(b);
  int32_t any = 0;
  for (int l = 0; l < kLanes; ++l) any |= differs[l];
  return any == 0;
}

// ---- rows ------------------------------------------------------------------------------------------

// A row of `count` elements, times `factor`, as `width` floats; 0 behind them.
template <class T>
inline void read_row(const T* from, int64_t count, int64_t width, float factor, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load_all(from + c) * splat(factor));
  if (c < width) store(to + c, load_some(from + c, count - c) * splat(factor));
}

template <class T>
inline void write_row(const float* from, int64_t count, float factor, T* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    store_some(to + c, smaller(kLanes, count - c), load(from + c) * splat(factor));
  }
}

template <class T>
inline T* row_of(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

// Rows token .. token + count - 1 of a head; rows up to a whole vector are 0.
template <class T>
inline void read_tile(const HeadsView& view, int64_t token, int64_t head, int64_t count,
                      int64_t head_dim, int64_t width, float factor, float* tile) {
  for (int64_t r = 0; r < count; ++r) {
    read_row(row_of<const T>(view, token + r, head), head_dim, width, factor, tile + r * width);
  }
  const int64_t whole = (count + kStrip - 1) / kStrip * kStrip;
  const int64_t end = larger(whole, vectors_of(count) * kLanes) * width;
  for (int64_t i = count * width; i < end; i += kLanes) store(tile + i, splat(0.0f));
}

template <class T>
inline void write_tile(const float* tile, int64_t width, float factor, const HeadsView& view,
                       int64_t token, int64_t head, int64_t count, int64_t head_dim) {
  for (int64_t r = 0; r < count; ++r) {
    write_row(tile + r * width, head_dim, factor, row_of<T>(view, token + r, head));
  }
}

template <int W>
inline void exchange(vfloat* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & W) != 0) continue;
    const vfloat a = x[i], b = x[i + W];
    x[i] = blend<W>(a, swap<W>(b));
    x[i + W] = blend<W>(swap<W>(a), b);
  }
  if constexpr (2 * W < kLanes) exchange<2 * W>(x);
}

// tile [count, width] -> turned [width, kTile].
inline void transpose_tile(const float* tile, int64_t count, int64_t width, float* turned) {
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      vfloat x[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) x[l] = load(tile + (r + l) * width + c);
      exchange<1>(x);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(turned + (c + l) * kTile + r, x[l]);
    }
  }
}

// ---- products --------------------------------------------------------------------------------------

// Element (r, k) at data[r * row + k * step]: a tile as it lies, or turned.
struct LeftMatrix {
  const float* data;
  int64_t row;
  int64_t step;
};

struct RowMajor {
  float* data;
  int64_t row;
};

template <int R, int V>
inline void product_tile(LeftMatrix a, const float* b, int64_t b_row, KeyRange k, float* c,
                         int64_t c_row, bool add) {
  vfloat sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v] = add ? load(c + r * c_row + v * kLanes) : splat(0.0f);
    }
  }
  for (int64_t j = k.begin; j < k.end; ++j) {
    vfloat part[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = load(b + j * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vfloat w = splat(a.data[r * a.row + j * a.step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fma(w, part[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
  }
}

template <int V>
inline void product_columns(LeftMatrix a, const float* b, int64_t b_row, KeyRange k, int64_t rows,
                            float* c, int64_t c_row, bool add) {
  if constexpr (kLanes == 16 && V < 4) {  // as many accumulators as 32 registers hold
    if (rows > 4) {
      product_tile<8, V>(a, b, b_row, k, c, c_row, add);
      return;
    }
  }
  for (int64_t r = 0; r < rows; r += 4) {
    const LeftMatrix below = {a.data + r * a.row, a.row, a.step};
    product_tile<4, V>(below, b, b_row, k, c + r * c_row, c_row, add);
  }
}

// c[r][v] = or += sum over k of a(r, k) b[k][v]: at most kStrip rows (computed in fours) and the vectors
// `columns` of a row.
inline void product(LeftMatrix a, RowMajor b, KeyRange k, int64_t rows, KeyRange columns, RowMajor c,
                    bool add) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  int64_t v = columns.begin;
  const auto at = [&](const RowMajor& x) { return x.data + v * kLanes; };
  for (; v + kMost <= columns.end; v += kMost) {
    product_columns<kMost>(a, at(b), b.row, k, rows, at(c), c.row, add);
  }
  switch (columns.end - v) {
    case 3: return product_columns<3>(a, at(b), b.row, k, rows, at(c), c.row, add);
    case 2: return product_columns<2>(a, at(b), b.row, k, rows, at(c), c.row, add);
    case 1: return product_columns<1>(a, at(b), b.row, k, rows, at(c), c.row, add);
    default: return;
  }
}

// ---- what a query sees -----------------------------------------------------------------------------

inline int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

// The first key of the first tile that a query sees.
inline int64_t first_key_tile(int64_t query, int64_t window) {
  return window > 0 ? larger(0, query - window + 1) / kTile * kTile : 0;
}

// A tile of queries and a tile of keys of one segment. Weights lie as [keys, kTile queries]; rows and
// columns are counted from the tiles' first.
struct TilePair {
  int64_t query;  // the first of `queries`, in the segment
  int64_t queries;
  int64_t key;
  int64_t keys;
  int64_t window;

  // Keys that any of the queries first .. last sees.
  KeyRange keys_of(int64_t first, int64_t last) const {
    const int64_t low = window > 0 ? larger(0, query + first - window + 1 - key) : 0;
    return {low, smaller(keys, query + last + 1 - key)};
  }

  // Queries that see any of the keys first .. last.
  KeyRange queries_of(int64_t first, int64_t last) const {
    const int64_t end = window > 0 ? smaller(queries, key + last + window - query) : queries;
    return {larger(0, key + first - query), end};
  }

  KeyRange vectors_of_strip(int64_t first, int64_t rows) const {
    const KeyRange range = queries_of(first, first + rows - 1);
    if (range.empty()) return {0, 0};
    return {range.begin / kLanes, vectors_of(range.end)};
  }

  bool all_see(int64_t j, int64_t column) const {
    const int64_t near = query + column - (key + j);
    return near >= 0 && (window == 0 || near + kLanes <= window);
  }

  // All bits set in the lanes of the queries from `column` on that see key j.
  vint who_sees(int64_t j, int64_t column) const {
    const vint distance = lane_numbers() + static_cast<int32_t>(query + column - (key + j));
    const vint below = distance >= 0;
    return window > 0 ? below & (distance < static_cast<int32_t>(window)) : below;
  }

  // Without a window, products read no weight that the strip's vectors do not hold. With one they do, and
  // it must be 0.
  void clear_others(float* weight, int64_t first, int64_t rows, KeyRange vectors) const {
    if (window == 0) return;
    for (int64_t j = first; j < first + rows; ++j) {
      for (int64_t v = 0; v < vectors_of(queries); ++v) {
        if (v >= vectors.begin && v < vectors.end) continue;
        store(weight + j * kTile + v * kLanes, splat(0.0f));
      }
    }
  }
};

// ---- tasks -----------------------------------------------------------------------------------------

// Tasks of all segments, those of long ones first: then no thread is left with a long one at the end.
class Tasks {
 public:
  // count(length): tasks of a segment.
  template <class Count>
  Tasks(const PackedAttentionArgs& args, const Count& count) : cu_(args.cu_seqlens) {
    segments_ = args.segments;
    order_ = static_cast<int64_t*>(std::malloc((2 * segments_ + 1) * sizeof(int64_t)));
    before_ = order_ + segments_;
    int64_t at[33] = {};
    for (int64_t s = 0; s < segments_; ++s) ++at[size_class(s)];
    for (int64_t c = 0, sum = 0; c < 33; ++c) {
      const int64_t here = at[c];
      at[c] = sum;
      sum += here;
    }
    for (int64_t s = 0; s < segments_; ++s) order_[at[size_class(s)]++] = s;
    before_[0] = 0;
    for (int64_t i = 0; i < segments_; ++i) {
      before_[i + 1] = before_[i] + count(length(order_[i]));
    }
  }
  ~Tasks() { std::free(order_); }
  Tasks(const Tasks&) = delete;
  Tasks& operator=(const Tasks&) = delete;

  int64_t total() const { return before_[segments_]; }

  struct Place {
    int64_t first;   // token of the segment
    int64_t length;  // of the segment
    int64_t number;  // of the task within it
  };

  Place find(int64_t task) const {
    int64_t i = 0;  // the last whose tasks begin at or before this one
    for (int64_t size = segments_; size > 1;) {
      const int64_t half = size / 2;
      if (before_[i + half] <= task) i += half;
      size -= half;
    }
    return {cu_[order_[i]], length(order_[i]), task - before_[i]};
  }

 private:
  int64_t length(int64_t s) const { return cu_[s + 1] - cu_[s]; }
  // 0 for lengths of 2^31 and more, 32 for 0.
  int64_t size_class(int64_t s) const {
    const auto n = static_cast<uint32_t>(length(s));
    return n == 0 ? 32 : __builtin_clz(n);
  }

  const int32_t* cu_;
  int64_t segments_;
  int64_t* order_;
  int64_t* before_;
};

// Products of the scores of all segments.
inline int64_t products_of(const PackedAttentionArgs& args) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t n = args.cu_seqlens[s + 1] - args.cu_seqlens[s];
    pairs += n * (args.window > 0 ? smaller(n, args.window) : n);
  }
  return pairs * args.query_heads * args.head_dim / 2;
}

// body(task, scratch) for every task, each thread with `floats` of scratch of its own.
template <class Body>
void share_tasks(int64_t tasks, int64_t floats, int threads, const Body& body) {
  const int64_t workers = smaller(larger(1, threads), tasks);
  if (workers == 0) return;
  const int64_t each = vectors_of(floats) * kLanes;
  void* memory = std::malloc((workers * each + 16) * sizeof(float));
  constexpr uintptr_t kLine = 64;  // bytes: a vector that lies across two lines is read twice
  auto* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + kLine - 1) /
                                           kLine * kLine);
  int64_t next = 0;
  parallel_for(workers, 1, threads, [&](int64_t worker, int64_t) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      body(task, scratch + worker * each);
    }
  });
  std::free(memory);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
