// The gradients of attention inside segments.
//
// With p = exp(scale q k - lse), D = sum_c out[c] grad_out[c] and g = p (grad_out v - D):
//
//     grad_q = scale g k,   grad_k = scale g^T q,   grad_v = p^T grad_out
//
// A task is one segment and key-value head: for each tile of keys, each head of the group and each tile of
// queries, p and g are formed once and enter all three. Where there are too few such tasks for the threads,
// a task is one tile of keys, or one tile of queries, and p and g are formed once for each: every sum has
// the same terms in the same order in both ways, and the same bits.
#include "cpu/packed_attention.h"

#include "cpu/attention_tiles.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

struct Scratch {
  float *k, *v, *q, *q_turned, *grad_out, *grad_out_turned, *grad_k, *grad_v;
  float *p, *g, *lse, *delta, *grad_q;

  // query_rows: rows of grad_q.
  static int64_t floats(int64_t width, int64_t query_rows) {
    return (8 * kTile + query_rows) * width + 2 * kTile * kTile + 2 * kTile;
  }
  Scratch(float* memory, int64_t width) {
    const int64_t tile = kTile * width;
    k = memory;
    v = k + tile;
    q = v + tile;
    q_turned = q + tile;
    grad_out = q_turned + tile;
    grad_out_turned = grad_out + tile;
    grad_k = grad_out_turned + tile;
    grad_v = grad_k + tile;
    p = grad_v + tile;
    g = p + kTile * kTile;
    lse = g + kTile * kTile;
    delta = lse + kTile;
    grad_q = delta + kTile;
  }
};

void clear(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, splat(0.0f));
}

// One segment and key-value head.
template <class T>
struct Gradients {
  const PackedAttentionArgs& args;
  const Tasks::Place place;
  const int64_t head;
  const int64_t width;
  const Scratch scratch;

  int64_t group() const { return args.query_heads / args.kv_heads; }
  int64_t in_tile(int64_t begin) const { return smaller(kTile, place.length - begin); }

  void read_keys(int64_t key) const {
    const int64_t count = in_tile(key), token = place.first + key;
    read_tile<T>(args.k, token, head, count, args.head_dim, width, 1.0f, scratch.k);
    read_tile<T>(args.v, token, head, count, args.head_dim, width, 1.0f, scratch.v);
  }

  void read_queries(int64_t query, int64_t query_head) const {
    const int64_t count = in_tile(query), token = place.first + query;
    const float scale = static_cast<float>(args.scale * kLog2OfE);
    read_tile<T>(args.q, token, query_head, count, args.head_dim, width, scale, scratch.q);
    transpose_tile(scratch.q, count, width, scratch.q_turned);
    read_tile<T>(args.grad_out, token, query_head, count, args.head_dim, width, 1.0f,
                 scratch.grad_out);
    transpose_tile(scratch.grad_out, count, width, scratch.grad_out_turned);
    float* out = scratch.p;  // until p is formed
    for (int64_t r = 0; r < count; ++r) {
      read_row(row_of<const T>(args.out, token + r, query_head), args.head_dim, width, 1.0f, out);
      vfloat sum = splat(0.0f);
      for (int64_t c = 0; c < width; c += kLanes) {
        sum = fma(load(out + c), load(scratch.grad_out + r * width + c), sum);
      }
      scratch.delta[r] = sum_of_lanes(sum);
      scratch.lse[r] = args.lse[(token + r) * args.query_heads + query_head] *
                       static_cast<float>(kLog2OfE);
    }
    for (int64_t r = count; r < kTile; ++r) scratch.delta[r] = scratch.lse[r] = 0.0f;
  }

  // p and g of one key, from scores in p and products of grad_out and values in g.
  void weigh(const TilePair& pair, int64_t j, KeyRange vectors) const {
    float *p = scratch.p + j * kTile, *g = scratch.g + j * kTile;
    for (int64_t column = vectors.begin * kLanes; column < vectors.end * kLanes; column += kLanes) {
      const vfloat x = load(p + column) - load(scratch.lse + column);
      vfloat weight = exp2_normal(vmax(splat(kLowestExponent), x));
      vfloat gradient = weight * (load(g + column) - load(scratch.delta + column));
      if (!pair.all_see(j, column)) {
        const vint seen = pair.who_sees(j, column);
        weight = select(seen, weight, splat(0.0f));
        gradient = select(seen, gradient, splat(0.0f));
      }
      store(p + column, weight);
      store(g + column, gradient);
    }
  }

  // What a tile of queries and a tile of keys, both read before, add: to grad_q of the queries, if it is
  // not null, and to grad_k and grad_v of the keys, if `of_keys`.
  void add_pair(const TilePair& pair, float* grad_q, bool of_keys) const {
    const KeyRange whole = {0, width / kLanes}, depth = {0, args.head_dim};
    for (int64_t j = 0; j < pair.keys; j += kStrip) {
      const int64_t rows = smaller(kStrip, pair.keys - j);
      const KeyRange vectors = pair.vectors_of_strip(j, rows);
      float *p = scratch.p + j * kTile, *g = scratch.g + j * kTile;
      product({scratch.k + j * width, width, 1}, {scratch.q_turned, kTile}, depth, rows, vectors,
              {p, kTile}, false);
      product({scratch.v + j * width, width, 1}, {scratch.grad_out_turned, kTile}, depth, rows,
              vectors, {g, kTile}, false);
      for (int64_t l = j; l < j + rows; ++l) weigh(pair, l, vectors);
      pair.clear_others(scratch.p, j, rows, vectors);
      pair.clear_others(scratch.g, j, rows, vectors);
      const KeyRange queries = pair.queries_of(j, j + rows - 1);
      if (!of_keys || queries.empty()) continue;
      product({p, kTile, 1}, {scratch.grad_out, width}, queries, rows, whole,
              {scratch.grad_v + j * width, width}, true);
      product({g, kTile, 1}, {scratch.q, width}, queries, rows, whole,
              {scratch.grad_k + j * width, width}, true);
    }
    if (grad_q == nullptr) return;
    for (int64_t r = 0; r < pair.queries; r += kStrip) {
      const int64_t rows = smaller(kStrip, pair.queries - r);
      product({scratch.g + r, 1, kTile}, {scratch.k, width}, pair.keys_of(r, r + rows - 1), rows,
              whole, {grad_q + r * width, width}, true);
    }
  }

  TilePair pair_of(int64_t query, int64_t key) const {
    return {query, in_tile(query), key, in_tile(key), args.window};
  }

  void write_queries(const float* grad_q, int64_t query, int64_t count, int64_t query_head) const {
    write_tile<T>(grad_q, width, args.scale, args.grad_q, place.first + query, query_head, count,
                  args.head_dim);
  }

  // grad_k and grad_v of a tile of keys; what it adds to grad_q of all queries, if `of_queries`.
  void tile_of_keys(int64_t key, bool of_queries) const {
    read_keys(key);
    clear(scratch.grad_k, kTile * width);
    clear(scratch.grad_v, kTile * width);
    const int64_t rows = tiles_of(place.length) * kTile;
    const int64_t seen = args.window > 0 ? key + kTile - 1 + args.window : place.length;
    for (int64_t member = 0; member < group(); ++member) {
      for (int64_t query = key; query < smaller(seen, place.length); query += kTile) {
        read_queries(query, head * group() + member);
        float* grad_q = scratch.grad_q + (member * rows + query) * width;
        add_pair(pair_of(query, key), of_queries ? grad_q : nullptr, true);
      }
    }
    const int64_t count = in_tile(key), token = place.first + key;
    // The queries came times scale and log2(e).
    write_tile<T>(scratch.grad_k, width, kLn2, args.grad_k, token, head, count, args.head_dim);
    write_tile<T>(scratch.grad_v, width, 1.0f, args.grad_v, token, head, count, args.head_dim);
  }

  // grad_q of a tile of queries, of all heads of the group.
  void tile_of_queries(int64_t query) const {
    const int64_t count = in_tile(query);
    for (int64_t member = 0; member < group(); ++member) {
      clear(scratch.grad_q, kTile * width);
      read_queries(query, head * group() + member);
      for (int64_t key = first_key_tile(query, args.window); key < query + count; key += kTile) {
        read_keys(key);
        add_pair(pair_of(query, key), scratch.grad_q, false);
      }
      write_queries(scratch.grad_q, query, count, head * group() + member);
    }
  }

  void whole_segment() const {
    const int64_t rows = tiles_of(place.length) * kTile;
    clear(scratch.grad_q, group() * rows * width);
    for (int64_t key = 0; key < place.length; key += kTile) tile_of_keys(key, true);
    for (int64_t member = 0; member < group(); ++member) {
      const float* grad_q = scratch.grad_q + member * rows * width;
      write_queries(grad_q, 0, place.length, head * group() + member);
    }
  }
};

template <class T>
void run(const PackedAttentionArgs& args, int64_t longest, bool in_tiles, int threads) {
  const int64_t width = vectors_of(args.head_dim) * kLanes;
  const int64_t group = args.query_heads / args.kv_heads;
  const Tasks tasks(args, [&](int64_t length) {
    const int64_t parts = in_tiles ? 2 * tiles_of(length) : length > 0;
    return parts * args.kv_heads;
  });
  const int64_t query_rows = in_tiles ? kTile : group * tiles_of(longest) * kTile;
  const int64_t floats = Scratch::floats(width, query_rows);
  share_tasks(tasks.total(), floats, threads, [&](int64_t task, float* memory) {
    const Tasks::Place place = tasks.find(task);
    const int64_t part = place.number / args.kv_heads, tiles = tiles_of(place.length);
    const Gradients<T> gradients = {args, place, place.number % args.kv_heads, width,
                                    Scratch(memory, width)};
    if (!in_tiles) {
      gradients.whole_segment();
    } else if (part < tiles) {
      gradients.tile_of_keys(part * kTile, false);
    } else {
      gradients.tile_of_queries((2 * tiles - 1 - part) * kTile);
    }
  });
}

}  // namespace

void packed_attention_backward(const PackedAttentionArgs& args) {
  const int threads = products_of(args) < kAlone ? 1 : args.threads;
  int64_t longest = 0;
  double all = 0.0;  // sums of squares: what segments cost
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t length = args.cu_seqlens[s + 1] - args.cu_seqlens[s];
    longest = larger(longest, length);
    all += static_cast<double>(length) * static_cast<double>(length);
  }
  // Forming p and g twice costs 7 products instead of 5: worth it where the longest segment would keep one
  // thread at work for longer than that.
  const double one = static_cast<double>(longest) * static_cast<double>(longest);
  const double share = 1.4 * all * static_cast<double>(args.kv_heads) / threads;
  const bool in_tiles = longest > kTile && one > share;
  if (args.dtype == DType::f32) {
    run<float>(args, longest, in_tiles, threads);
  } else {
    run<uint16_t>(args, longest, in_tiles, threads);
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
