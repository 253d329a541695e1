#include "host/row_ops.h"

#include <algorithm>

#include "host/parallel.h"

namespace rlhf_fast {
namespace {

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

// ---- rows [begin, begin + count) of each op, on one thread ----------------------------------------

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
  args.threads = 1;
  return args;
}

LinearSmallArgs slice(LinearSmallArgs args, int64_t begin, int64_t count) {
  args.rows = count;
  advance(args.x, begin * args.x_stride);
  advance(args.residual, begin * args.residual_stride);
  advance(args.out, begin * args.out_stride);
  args.threads = 1;
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
  args.threads = 1;
  return args;
}

PagedAttentionArgs slice(PagedAttentionArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.sequences = count;
  advance(args.q, begin * args.q_strides[0] * width);
  advance(args.out, begin * args.out_strides[0] * width);
  advance(args.page_table, begin * args.table_stride);
  advance(args.context_lengths, begin);
  args.threads = 1;
  return args;
}

SiluMulArgs slice(SiluMulArgs args, int64_t begin, int64_t count) {
  const int64_t width = bytes_of(args.dtype);
  args.rows = count;
  advance(args.gate_up, begin * args.row_stride * width);
  advance(args.out, begin * args.out_row_stride * width);
  args.threads = 1;
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
  args.threads = 1;
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

}  // namespace

int64_t rows_of(const RowOp& op) {
  return std::visit([](const auto& args) { return rows(args); }, op);
}

void run_op(const RowOp& op) {
  std::visit([](const auto& args) { run(args); }, op);
}

void run_ops(const std::vector<RowOp>& ops, int threads) {
  const int64_t count = ops.empty() ? 0 : rows_of(ops.front());
  if (threads > 1 && count < kRowsOfThread * threads) {
    for (const RowOp& op : ops) run_op(op);
    return;
  }
  // Whole vectors of rows, where products turn rows into lanes.
  const int64_t share = (count + threads - 1) / std::max(threads, 1);
  const int64_t grain = (share + kRowsOfThread - 1) / kRowsOfThread * kRowsOfThread;
  parallel_for(count, grain, threads, [&ops](int64_t begin, int64_t end) {
    for (const RowOp& op : ops) {
      std::visit([&](const auto& args) { run(slice(args, begin, end - begin)); }, op);
    }
  });
}

}  // namespace rlhf_fast
