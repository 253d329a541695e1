// Flash-style attention over pages.
//
// A task is up to kRows rows of one sequence and one key-value head; a row is a (query, query head) pair, so
// the heads of a group and the queries of a prompt share every key they read. Keys are taken in blocks of
// kBlock at absolute positions. Whatever stands beside a row, each of its scores, maxima and sums is made by
// the same operations in the same order: a row that is decoded has the bits of a row that is prefilled.
#include "cpu/paged_attention.h"

#include <cstdlib>

#include "cpu/attention_sums.h"
#include "cpu/softcap.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kWidth = PagedAttentionArgs::kWidest;
constexpr double kLog2E = 1.4426950408889634;
// Products below which waking a second thread costs more than it saves (about 10 us).
constexpr int64_t kAlone = 1 << 19;

int64_t first_query(const PagedAttentionArgs& args, int64_t s) {
  return args.cu_queries == nullptr ? s : args.cu_queries[s];
}

// Which query of the sequence, and which head of the group.
struct RowNumber {
  int64_t query;
  int64_t member;
  void next(int64_t group) {
    if (++member < group) return;
    member = 0;
    ++query;
  }
};

// What the rows of a task share, and their state.
struct Task {
  alignas(64) float q[kRows * kWidth];    // times scale and, without softcap, log2(e)
  alignas(64) float acc[kRows * kWidth];
  alignas(64) float score[kRows * kBlock];
  alignas(64) float staged[kBlock * kWidth];
  float best[kRows];
  float mass[kRows];
  int64_t low[kRows];   // the row sees keys low .. high - 1
  int64_t high[kRows];
  const float* key[kBlock];
  int64_t rows;
  int64_t width;  // head_dim rounded up to whole vectors
};

void load_row(const void* data, DType dtype, int64_t at, int64_t count, int64_t width, float* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, static_cast<const float*>(data) + at, count * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(data) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(x[i]);
  }
  for (int64_t i = count; i < width; ++i) out[i] = 0.0f;
}

// Points task.key[j] at the row of token first + j of one head, for the keys that a row of the task sees.
// Rows that are not fp32 or end inside a vector are widened into task.staged first.
void find_rows(const PagedAttentionArgs& args, Task& task, const void* data, const int64_t* strides,
               const int32_t* table, int64_t head, int64_t first, int64_t count) {
  const bool direct = args.dtype == DType::f32 && task.width == args.head_dim;
  const int64_t begin = larger(0, task.low[0] - first);
  int64_t block = (first + begin) / args.page_size;
  int64_t slot = (first + begin) % args.page_size;
  for (int64_t j = begin; j < count; ++block, slot = 0) {
    const int64_t run = smaller(count - j, args.page_size - slot);
    int64_t at = table[block] * strides[0] + slot * strides[1] + head * strides[2];
    for (const int64_t stop = j + run; j < stop; ++j, at += strides[1]) {
      if (direct) {
        task.key[j] = static_cast<const float*>(data) + at;
      } else {
        float* row = task.staged + j * task.width;
        load_row(data, args.dtype, at, args.head_dim, task.width, row);
        task.key[j] = row;
      }
    }
  }
  // A vector of scores is computed whole: another key stands in for those that are not there.
  for (int64_t j = begin / kLanes * kLanes; j < begin; ++j) task.key[j] = task.key[begin];
  for (int64_t j = count; j % kLanes != 0; ++j) task.key[j] = task.key[begin];
}

// Rows take `group` query heads from `query_head` on in turn, then the next query.
void start_rows(const PagedAttentionArgs& args, Task& task, int64_t s, int64_t query_head,
                int64_t group, int64_t first_row) {
  const int64_t begin = first_query(args, s);
  const int64_t queries = first_query(args, s + 1) - begin;
  const float scale = static_cast<float>(args.scale * (args.softcap > 0.0f ? 1.0 : kLog2E));
  RowNumber row = {first_row / group, first_row % group};
  for (int64_t r = 0; r < task.rows; ++r, row.next(group)) {
    const int64_t at =
        (begin + row.query) * args.q_strides[0] + (query_head + row.member) * args.q_strides[1];
    float* q = task.q + r * task.width;
    load_row(args.q, args.dtype, at, args.head_dim, task.width, q);
    for (int64_t i = 0; i < task.width; ++i) q[i] *= scale;
    for (int64_t i = 0; i < task.width; ++i) task.acc[r * task.width + i] = 0.0f;
    task.best[r] = -__builtin_inff();
    task.mass[r] = 0.0f;
    task.high[r] = larger(0, args.context_lengths[s] - queries + row.query + 1);
    task.low[r] = args.window > 0 ? larger(0, task.high[r] - args.window) : 0;
  }
}

void finish_rows(const PagedAttentionArgs& args, const Task& task, int64_t s, int64_t query_head,
                 int64_t group, int64_t first_row) {
  const int64_t begin = first_query(args, s);
  RowNumber row = {first_row / group, first_row % group};
  for (int64_t r = 0; r < task.rows; ++r, row.next(group)) {
    const int64_t at =
        (begin + row.query) * args.out_strides[0] + (query_head + row.member) * args.out_strides[1];
    const float* acc = task.acc + r * task.width;
    const float inverse = task.high[r] > 0 ? 1.0f / task.mass[r] : 0.0f;
    if (args.dtype == DType::f32) {
      float* out = static_cast<float*>(args.out) + at;
      for (int64_t i = 0; i < args.head_dim; ++i) out[i] = acc[i] * inverse;
    } else {
      uint16_t* out = static_cast<uint16_t*>(args.out) + at;
      for (int64_t i = 0; i < args.head_dim; ++i) out[i] = float_to_bf16(acc[i] * inverse);
    }
  }
}

// softcap * tanh(score / softcap), in units of log2.
void cap_scores(float softcap, KeyRange range, float* score) {
  const Softcap cap(softcap);
  const vfloat unit = cap.cap * splat(static_cast<float>(kLog2E));
  for (int64_t j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) {
    store(score + j, unit * cap.tanh_at(load(score + j)));
  }
}

void rescale(Task& task, int64_t r, float factor) {
  if (factor == 1.0f) return;
  const vfloat f = splat(factor);
  float* acc = task.acc + r * task.width;
  for (int64_t i = 0; i < task.width; i += kLanes) store(acc + i, load(acc + i) * f);
}

template <int kChunks>
void attend_block(const PagedAttentionArgs& args, Task& task, const int32_t* table, int64_t head,
                  int64_t first, int64_t count) {
  find_rows(args, task, args.keys, args.key_strides, table, head, first, count);
  KeyRange range[kRows];
  for (int64_t r = 0; r < task.rows; ++r) {
    range[r] = {larger(0, task.low[r] - first), smaller(count, task.high[r] - first)};
    if (range[r].empty()) continue;
    float* score = task.score + r * kBlock;
    scores_of<kChunks>(task.q + r * task.width, task.key, task.width, range[r], score);
    if (args.softcap > 0.0f) cap_scores(args.softcap, range[r], score);
    float factor;
    soften<1>(score, range[r], task.best + r, task.mass + r, &factor);
    rescale(task, r, factor);
  }
  find_rows(args, task, args.values, args.value_strides, table, head, first, count);
  add_values<kChunks>(task.score, task.key, range, task.rows, task.width, task.acc);
}

template <int kChunks>
void run_task(const PagedAttentionArgs& args, int64_t s, int64_t head, int64_t first_row,
              int64_t rows) {
  const int64_t group = args.query_heads / args.kv_heads;
  Task task;
  task.rows = rows;
  task.width = (args.head_dim + kLanes - 1) / kLanes * kLanes;
  start_rows(args, task, s, head * group, group, first_row);
  const int32_t* table = args.page_table + s * args.table_stride;
  const int64_t high = task.high[rows - 1];  // later queries see more
  for (int64_t first = task.low[0] / kBlock * kBlock; first < high; first += kBlock) {
    const int64_t count = smaller(kBlock, high - first);
    attend_block<kChunks>(args, task, table, head, first, count);
  }
  finish_rows(args, task, s, head * group, group, first_row);
}

// ---- decoding without groups -------------------------------------------------------------------------
//
// A sequence then has one row for each head, and a row alone is bound by the latency of its sums: so kHeads
// rows of a sequence, with keys of their own, go side by side.

// A block of keys of a sequence.
struct Block {
  int64_t s;
  int64_t first;
  int64_t begin;  // the keys before it are not seen, and their pages not looked up
  int64_t count;
};

// The block with which a decoding sequence begins.
Block first_block(const PagedAttentionArgs& args, int64_t s) {
  const int64_t high = larger(0, args.context_lengths[s]);
  const int64_t low = args.window > 0 ? larger(0, high - args.window) : 0;
  const int64_t first = low / kBlock * kBlock;
  return {s, first, low - first, smaller(kBlock, high - first)};
}

// Where the keys or values of the next block lie that are asked for while one is worked on: sequences lie
// scattered, and the processor's own prefetching ends with each page.
struct Ahead {
  const float* key[kBlock];
  int64_t begin;
  int64_t count;
  int64_t stride;  // of heads

  // Of key j and head h, into the second-level cache: the first can wait for few lines at a time, with which
  // one core read memory at 10 GB/s instead of 21.
  void fetch(int64_t j, int64_t h, int64_t head_dim) const {
    if (j < begin || j >= count) return;
    const char* row = reinterpret_cast<const char*>(key[j] + h * stride);
    for (int64_t byte = 0; byte < head_dim * 4; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
};

Ahead ahead_of(const PagedAttentionArgs& args, const void* data, const int64_t* strides, Block block,
               int64_t head) {
  Ahead ahead;
  ahead.begin = block.begin;
  ahead.count = block.count;
  ahead.stride = strides[2];
  const int32_t* table = args.page_table + block.s * args.table_stride;
  for (int64_t j = block.begin; j < block.count;) {
    const int64_t slot = (block.first + j) % args.page_size;
    const int64_t run = smaller(block.count - j, args.page_size - slot);
    int64_t at = table[(block.first + j) / args.page_size] * strides[0] + slot * strides[1] +
                 head * strides[2];
    for (const int64_t stop = j + run; j < stop; ++j, at += strides[1]) {
      ahead.key[j] = static_cast<const float*>(data) + at;
    }
  }
  return ahead;
}

// The rows of kHeads heads from `head` on; of the next block, those from `next_head` on are asked for.
template <int kChunks, int kHeads>
void attend_heads(const PagedAttentionArgs& args, Task& task, Block block, int64_t head, Block next,
                  int64_t next_head) {
  const int32_t* table = args.page_table + block.s * args.table_stride;
  const KeyRange range = {block.begin, block.count};
  find_rows(args, task, args.keys, args.key_strides, table, head, block.first, block.count);
  const Ahead keys = ahead_of(args, args.keys, args.key_strides, next, next_head);
  for (int64_t j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t l = 0; l < kLanes; ++l) keys.fetch(j + l, h, args.head_dim);
      scores_of_vector<kChunks>(task.q + h * task.width, task.key + j, h * args.key_strides[2],
                                task.width, task.score + h * kBlock + j);
    }
  }
  for (int64_t h = 0; h < kHeads && args.softcap > 0.0f; ++h) {
    cap_scores(args.softcap, range, task.score + h * kBlock);
  }
  float factor[kHeads];
  soften<kHeads>(task.score, range, task.best, task.mass, factor);
  for (int64_t h = 0; h < kHeads; ++h) rescale(task, h, factor[h]);
  find_rows(args, task, args.values, args.value_strides, table, head, block.first, block.count);
  const Ahead values = ahead_of(args, args.values, args.value_strides, next, next_head);
  add_own<kHeads, kChunks>(task.score, task.key, args.value_strides[2], range, task.width, task.acc,
                           [&](int64_t j) {
                             for (int64_t h = 0; h < kHeads; ++h) {
                               values.fetch(j, h, args.head_dim);
                             }
                           });
}

template <int kChunks, int kHeads>
void run_heads(const PagedAttentionArgs& args, int64_t s, int64_t head, int64_t next_s,
               int64_t next_head) {
  Task task;
  task.rows = kHeads;
  task.width = args.head_dim;
  start_rows(args, task, s, head, kHeads, 0);
  const int64_t high = args.context_lengths[s];
  Block block = first_block(args, s);
  while (block.count > 0) {
    const int64_t first = block.first + kBlock;
    const bool last = first >= high;
    const Block next = last ? first_block(args, next_s)
                            : Block{s, first, 0, smaller(kBlock, high - first)};
    attend_heads<kChunks, kHeads>(args, task, block, head, next, last ? next_head : head);
    if (last) break;
    block = next;
  }
  finish_rows(args, task, s, head, kHeads, 0);
}

using RunHeads = void (*)(const PagedAttentionArgs&, int64_t, int64_t, int64_t, int64_t);

template <int kHeads>
RunHeads kernel_of_heads(int64_t head_dim) {
  switch (head_dim) {
    case 32: return run_heads<32 / kLanes, kHeads>;
    case 64: return run_heads<64 / kLanes, kHeads>;
    case 128: return run_heads<128 / kLanes, kHeads>;
    default: return run_heads<0, kHeads>;
  }
}

void decode_heads(const PagedAttentionArgs& args, int64_t heads, int threads) {
  const RunHeads run =
      heads == 4 ? kernel_of_heads<4>(args.head_dim) : kernel_of_heads<2>(args.head_dim);
  const int64_t each = args.kv_heads / heads;  // tasks of a sequence
  const int64_t tasks = args.sequences * each;
  const int64_t grain = larger(1, smaller(8, tasks / (16 * larger(1, threads))));
  parallel_for(tasks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t next = smaller(t + 1, tasks - 1);
      run(args, t / each, t % each * heads, next / each, next % each * heads);
    }
  });
}

// ---- everything else ------------------------------------------------------------------------------------

using RunTask = void (*)(const PagedAttentionArgs&, int64_t, int64_t, int64_t, int64_t);

RunTask kernel_for(int64_t head_dim) {
  switch (head_dim) {
    case 32: return run_task<32 / kLanes>;
    case 64: return run_task<64 / kLanes>;
    case 128: return run_task<128 / kLanes>;
    default: return run_task<0>;
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args) {
  const int64_t group = args.query_heads / args.kv_heads;
  const bool direct = args.dtype == DType::f32 && args.head_dim % kLanes == 0;
  if (args.cu_queries == nullptr && group == 1 && direct && args.kv_heads % 2 == 0) {
    return decode_heads(args, args.kv_heads % 4 == 0 ? 4 : 2, args.threads);
  }
  // tasks_before[s]: tasks of one head in the sequences before s.
  auto* tasks_before = static_cast<int64_t*>(std::malloc((args.sequences + 1) * sizeof(int64_t)));
  int64_t products = 0;
  tasks_before[0] = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t rows = (first_query(args, s + 1) - first_query(args, s)) * group;
    tasks_before[s + 1] = tasks_before[s] + (rows + kRows - 1) / kRows;
    products += rows * args.context_lengths[s] * args.kv_heads * args.head_dim;
  }
  const RunTask run = kernel_for(args.head_dim);
  const int64_t tasks = tasks_before[args.sequences] * args.kv_heads;
  const int threads = products < kAlone ? 1 : args.threads;
  const int64_t grain = larger(1, smaller(8, tasks / (16 * larger(1, threads))));
  parallel_for(tasks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t head = t % args.kv_heads;
      const int64_t place = t / args.kv_heads;
      int64_t s = 0;  // the last sequence whose tasks begin at or before place
      for (int64_t size = args.sequences; size > 1;) {
        const int64_t half = size / 2;
        if (tasks_before[s + half] <= place) s += half;
        size -= half;
      }
      const int64_t first_row = (place - tasks_before[s]) * kRows;
      const int64_t rows = (first_query(args, s + 1) - first_query(args, s)) * group;
      run(args, s, head, first_row, smaller(kRows, rows - first_row));
    }
  });
  std::free(tasks_before);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
