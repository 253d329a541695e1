// Ops whose rows do not read each other, bound to their arguments, and several of them in a row.
//
// In a decoding step every op works row by row on what the op before it wrote for the same row. So a thread
// may take some of the rows through all ops: nothing is waited for between them, and keys, values and
// activations of a row stay in the caches of one core.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/decode_state.h"
#include "cpu/gather_rows.h"
#include "cpu/linear_small.h"
#include "cpu/paged_attention.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_and_store.h"
#include "cpu/sample.h"
#include "cpu/silu_mul.h"

namespace rlhf_fast {

// Of PagedAttentionArgs: one query a sequence.
using RowOp = std::variant<PlaceTokensArgs, GatherRowsArgs, RmsNormArgs, LinearSmallArgs,
                           RopeAndStoreArgs, PagedAttentionArgs, SiluMulArgs, SampleArgs,
                           RecordTokensArgs>;

int64_t rows_of(const RowOp& op);

// All rows, on the threads that the op was given.
void run_op(const RowOp& op);

// The ops one after the other. With kRowsOfThread or more rows for each of `threads`, a thread takes a slice of
// the rows through all of them; with fewer an op's work is shared by the threads, as `run_op` does. All ops
// have as many rows.
constexpr int64_t kRowsOfThread = 8;
void run_ops(const std::vector<RowOp>& ops, int threads);

}  // namespace rlhf_fast
