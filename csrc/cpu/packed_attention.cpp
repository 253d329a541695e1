// Flash-style attention inside segments.
//
// A task is a tile of queries of one segment and head. It takes the keys it sees a tile at a time: scores
// are keys times the turned queries, so that a vector holds one key's scores of as many queries and the
// softmax (online, in base 2) needs no sum across lanes; then weights times values.
#include "cpu/packed_attention.h"

#include <cmath>

#include "cpu/attention_tiles.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

struct Scratch {
  float *turned, *rows, *acc, *score, *best, *mass, *factor;

  static int64_t floats(int64_t width) { return 3 * kTile * width + kTile * kTile + 3 * kTile; }
  Scratch(float* memory, int64_t width) {
    const int64_t tile = kTile * width;
    turned = memory;
    rows = turned + tile;
    acc = rows + tile;
    score = acc + tile;
    best = score + kTile * kTile;
    mass = best + kTile;
    factor = mass + kTile;
  }
};

// Scores of a vector of queries to weights relative to their new maxima. True if earlier sums must be
// multiplied by `factor`.
bool soften(const TilePair& pair, int64_t vector, const Scratch& scratch) {
  const int64_t column = vector * kLanes;
  // Of the whole strip where a vector is shorter: products read the strip's weights together.
  const int64_t first = column / kStrip * kStrip;
  const KeyRange keys = pair.keys_of(first, first + larger(kStrip, kLanes) - 1);
  const vfloat lowest = splat(-__builtin_inff()), before = load(scratch.best + column);
  float* score = scratch.score + column;
  vfloat top = before;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    vfloat x = load(score + j * kTile);
    if (!pair.all_see(j, column)) {
      x = select(pair.who_sees(j, column), x, lowest);
      store(score + j * kTile, x);
    }
    top = vmax(x, top);
  }
  const vfloat pivot = select(top == lowest, splat(0.0f), top);
  const vfloat factor = exp2_normal(vmax(splat(kLowestExponent), before - pivot));
  vfloat sum = load(scratch.mass + column) * factor;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const vfloat x = load(score + j * kTile);
    const vfloat weight = exp2_normal(vmax(splat(kLowestExponent), x - pivot));
    const vfloat kept = select(x == lowest, splat(0.0f), weight);
    store(score + j * kTile, kept);
    sum += kept;
  }
  store(scratch.best + column, top);
  store(scratch.mass + column, sum);
  store(scratch.factor + column, factor);
  return !is_same(before, top);
}

template <class T>
struct Attention {
  const PackedAttentionArgs& args;
  const Tasks::Place place;
  const int64_t head;
  const int64_t width;
  const Scratch scratch;

  void add_keys(const TilePair& pair, bool first) const {
    const int64_t kv_head = head / (args.query_heads / args.kv_heads);
    const int64_t token = place.first + pair.key;
    const KeyRange depth = {0, args.head_dim}, whole = {0, width / kLanes};
    read_tile<T>(args.k, token, kv_head, pair.keys, args.head_dim, width, 1.0f, scratch.rows);
    for (int64_t j = 0; j < pair.keys; j += kStrip) {
      const int64_t rows = smaller(kStrip, pair.keys - j);
      const KeyRange vectors = pair.vectors_of_strip(j, rows);
      product({scratch.rows + j * width, width, 1}, {scratch.turned, kTile}, depth, rows, vectors,
              {scratch.score + j * kTile, kTile}, false);
      pair.clear_others(scratch.score, j, rows, vectors);
    }
    bool moved = false;
    for (int64_t v = 0; v < vectors_of(pair.queries); ++v) moved |= soften(pair, v, scratch);
    read_tile<T>(args.v, token, kv_head, pair.keys, args.head_dim, width, 1.0f, scratch.rows);
    for (int64_t r = 0; r < pair.queries; r += kStrip) {
      const int64_t rows = smaller(kStrip, pair.queries - r);
      float* acc = scratch.acc + r * width;
      if (!first && moved) scale_rows(acc, scratch.factor + r, rows);
      product({scratch.score + r, 1, kTile}, {scratch.rows, width}, pair.keys_of(r, r + rows - 1),
              rows, whole, {acc, width}, !first);
    }
  }

  void scale_rows(float* acc, const float* factor, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r, acc += width) {
      const vfloat f = splat(factor[r]);
      for (int64_t c = 0; c < width; c += kLanes) store(acc + c, load(acc + c) * f);
    }
  }

  void run(int64_t begin) const {
    const int64_t count = smaller(kTile, place.length - begin);
    read_tile<T>(args.q, place.first + begin, head, count, args.head_dim, width,
                 static_cast<float>(args.scale * kLog2OfE), scratch.rows);
    transpose_tile(scratch.rows, count, width, scratch.turned);
    for (int64_t i = 0; i < kTile; ++i) {
      scratch.best[i] = -__builtin_inff();
      scratch.mass[i] = 0.0f;
    }
    const int64_t lowest = first_key_tile(begin, args.window);
    for (int64_t key = lowest; key < begin + count; key += kTile) {
      const int64_t keys = smaller(kTile, begin + count - key);
      add_keys({begin, count, key, keys, args.window}, key == lowest);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = place.first + begin + r;
      write_row(scratch.acc + r * width, args.head_dim, 1.0f / scratch.mass[r],
                row_of<T>(args.out, token, head));
      args.lse[token * args.query_heads + head] =
          (scratch.best[r] + ::log2f(scratch.mass[r])) * kLn2;
    }
  }
};

}  // namespace

void packed_attention(const PackedAttentionArgs& args) {
  const Tasks tasks(args, [&args](int64_t length) { return tiles_of(length) * args.query_heads; });
  const int64_t width = vectors_of(args.head_dim) * kLanes;
  const int threads = products_of(args) < kAlone ? 1 : args.threads;
  share_tasks(tasks.total(), Scratch::floats(width), threads, [&](int64_t task, float* memory) {
    const Tasks::Place place = tasks.find(task);
    const int64_t head = place.number % args.query_heads;
    // The last tile of a segment sees most: it comes first.
    const int64_t begin =
        (tiles_of(place.length) - 1 - place.number / args.query_heads) * kTile;
    const Scratch scratch(memory, width);
    if (args.dtype == DType::f32) {
      Attention<float>{args, place, head, width, scratch}.run(begin);
    } else {
      Attention<uint16_t>{args, place, head, width, scratch}.run(begin);
    }
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
