#include "host/row_ops.h"

#include <algorithm>

#include "host/parallel.h"

namespace rlhf_fast {
namespace {

// A thread's rows come in whole panels of linear_small, and so many at a time that they stay in a core's cache.
constexpr int64_t kPanel = 8;
constexpr int64_t kRowsAtOnce = 64;
// Every thread reads all weights: from a cache that pays from the first panel on, from memory only where each
// weight meets many rows.
constexpr int64_t kCachedWeights = int64_t{32} << 20;

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <class T>
void advance(T*& pointer, int64_t elements) {
  if (pointer != nullptr) pointer += elements;
}

void advance(const void*& pointer, int64_t bytes) {
  if (pointer != nullptr) pointer = static_cast<const char*>(pointer) + bytes;
}

void advance(void*& pointer, int64_t bytes) {
  if (pointer != nullptr) pointer = static_cast<char*>(pointer) + bytes;
}

// ---- rows [begin, begin + count) of each op -------------------------------------------------------

PlaceTokensArgs slice(PlaceTokensArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.state, begin);
  advance(args.page_table, begin * args.table_stride);
  advance(args.ids, begin);
  advance(args.positions, begin);
  advance(args.slots, begin);
  advance(args.contexts, begin);
  return args;
}

GatherRowsArgs slice(GatherRowsArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.ids, begin);
  advance(args.out, begin * args.out_stride);
  return args;
}

RmsNormArgs slice(RmsNormArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.rows = count;
  advance(args.x.data, begin * args.x.outer_stride * width);
  advance(args.residual.data, begin * args.residual.outer_stride * width);
  advance(args.out.data, begin * args.out.outer_stride * width);
  return args;
}

LinearSmallArgs slice(LinearSmallArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.x, begin * args.x_stride);
  advance(args.residual, begin * args.residual_stride);
  advance(args.out, begin * args.out_stride);
  return args;
}

RopeAndStoreArgs slice(RopeAndStoreArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.tokens = count;
  advance(args.q, begin * args.q_strides[0] * width);
  advance(args.k, begin * args.k_strides[0] * width);
  advance(args.v, begin * args.v_strides[0] * width);
  advance(args.slots, begin);
  advance(args.positions, begin);
  return args;
}

PagedAttentionArgs slice(PagedAttentionArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.sequences = count;
  advance(args.q, begin * args.q_strides[0] * width);
  advance(args.out, begin * args.out_strides[0] * width);
  advance(args.page_table, begin * args.table_stride);
  advance(args.context_lengths, begin);
  return args;
}

SiluMulArgs slice(SiluMulArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.rows = count;
  advance(args.gate_up, begin * args.row_stride * width);
  advance(args.out, begin * args.out_row_stride * width);
  return args;
}

SampleArgs slice(SampleArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.logits, begin * args.row_stride * bytes_of(args.dtype));
  advance(args.seeds, begin);
  advance(args.steps, begin);
  advance(args.temperature, begin);
  advance(args.top_k, begin);
  advance(args.top_p, begin);
  advance(args.min_p, begin);
  advance(args.tokens, begin);
  advance(args.logprobs, begin);
  advance(args.raw_logprobs, begin);
  advance(args.entropy, begin);
  return args;
}

RecordTokensArgs slice(RecordTokensArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.state, begin);
  advance(args.stops, begin * args.stop_width);
  advance(args.tokens, begin);
  advance(args.logprobs, begin);
  advance(args.raw_logprobs, begin);
  return args;
}

// ---- the tokens of sequences [begin, end) ----------------------------------------------------------

template <class Args>
Args slice_sequences(const Args& args, const int32_t* bounds, int64_t begin, int64_t end) {
  return slice(args, bounds[begin], bounds[end] - bounds[begin]);
}

// The rows of q and out are found through cu_queries.
PagedAttentionArgs slice_sequences(PagedAttentionArgs args, const int32_t*, int64_t begin,
                                   int64_t end) {
  args.sequences = end - begin;
  advance(args.page_table, begin * args.table_stride);
  advance(args.context_lengths, begin);
  advance(args.cu_queries, begin);
  return args;
}

// ---- one name for all ----------------------------------------------------------------------------

int64_t rows(const RopeAndStoreArgs& args) { return args.tokens; }
int64_t rows(const PagedAttentionArgs& args) { return args.sequences; }
template <class Args>
int64_t rows(const Args& args) {
  return args.rows;
}

void run(const PlaceTokensArgs& args) { place_tokens(args); }
void run(const GatherRowsArgs& args) { gather_rows(args); }
void run(const RmsNormArgs& args) { rms_norm(args); }
void run(const LinearSmallArgs& args) { linear_small(args); }
void run(const RopeAndStoreArgs& args) { rope_and_store(args); }
void run(const PagedAttentionArgs& args) { paged_attention(args); }
void run(const SiluMulArgs& args) { silu_mul(args); }
void run(const SampleArgs& args) { sample(args); }
void run(const RecordTokensArgs& args) { record_tokens(args); }

// A part of a call on `of_rows` rows has its numbers, and `threads` threads.
template <class Args>
void make_part(Args& args, int64_t, int threads) {
  args.threads = threads;
}
void make_part(LinearSmallArgs& args, int64_t of_rows, int threads) {
  args.of_rows = of_rows;
  args.threads = threads;
}
void make_part(PlaceTokensArgs&, int64_t, int) {}
void make_part(GatherRowsArgs&, int64_t, int) {}
void make_part(RecordTokensArgs&, int64_t, int) {}

// Rows [begin, end) of `of_rows`, of all ops.
void run_slices(const std::vector<RowOp>& ops, int64_t begin, int64_t end, int64_t of_rows,
                int threads) {
  for (const RowOp& op : ops) {
    std::visit(
        [&](const auto& args) {
          auto part = slice(args, begin, end - begin);
          make_part(part, of_rows, threads);
          run(part);
        },
        op);
  }
}

// 0 where no op records tokens.
int64_t live_rows(const std::vector<RowOp>& ops, int64_t rows) {
  int64_t live = 0;
  for (const RowOp& op : ops) {
    const auto* record = std::get_if<RecordTokensArgs>(&op);
    for (int64_t r = 0; record != nullptr && r < rows; ++r) {
      live += record->state[kLive * record->field_stride + r] > 0;
    }
  }
  return live;
}

int64_t weight_bytes(const std::vector<RowOp>& ops) {
  int64_t bytes = 0;
  for (const RowOp& op : ops) {
    if (const auto* product = std::get_if<LinearSmallArgs>(&op)) {
      bytes += product->columns * product->inner * static_cast<int64_t>(sizeof(float));
    }
  }
  return bytes;
}

}  // namespace

int64_t rows_of(const RowOp& op) {
  return std::visit([](const auto& args) { return rows(args); }, op);
}

void run_op(const RowOp& op) {
  std::visit([](const auto& args) { run(args); }, op);
}

int64_t run_ops(const std::vector<RowOp>& ops, int64_t rows, int64_t times, int threads) {
  const int64_t least = weight_bytes(ops) <= kCachedWeights ? kPanel : kRowsAtOnce / 2;
  const bool shared = threads > 1 && rows < least * threads;
  const int64_t share = (rows + threads - 1) / std::max(threads, 1);
  const int64_t grain = std::min(kRowsAtOnce, (share + kPanel - 1) / kPanel * kPanel);
  const int64_t before = live_rows(ops, rows);
  for (int64_t done = 1; done <= times; ++done) {
    if (shared) {
      run_slices(ops, 0, rows, rows, threads);
    } else {
      parallel_for(rows, grain, threads,
                   [&](int64_t begin, int64_t end) { run_slices(ops, begin, end, rows, 1); });
    }
    if (live_rows(ops, rows) < before) return done;
  }
  return times;
}

void run_ops_on_sequences(const std::vector<RowOp>& ops, const std::vector<RowOp>& last,
                          const int32_t* bounds, int64_t sequences, int threads) {
  std::vector<int64_t> starts;  // of groups of sequences
  for (int64_t s = 0; s < sequences; ++s) {
    if (starts.empty() || bounds[s] - bounds[starts.back()] >= kRowsAtOnce) starts.push_back(s);
  }
  const auto groups = static_cast<int64_t>(starts.size());
  starts.push_back(sequences);
  parallel_for(groups, 1, threads, [&](int64_t first, int64_t stop) {
    for (int64_t g = first; g < stop; ++g) {
      const int64_t begin = starts[g], end = starts[g + 1];
      for (const RowOp& op : ops) {
        std::visit(
            [&](const auto& args) {
              auto part = slice_sequences(args, bounds, begin, end);
              make_part(part, bounds[sequences], 1);
              run(part);
            },
            op);
      }
      run_slices(last, begin, end, sequences, 1);
    }
  });
}

}  // namespace rlhf_fast
