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

// The ops one after the other, `times` times, on the first `rows` of their rows, of which all have as many. If
// there are enough for each of `threads`, a thread takes a slice of them through all ops; else the threads share the
// work of each op, as in `run_op`. Returns how often it was: a time in which record_tokens ended a row is the last.
int64_t run_ops(const std::vector<RowOp>& ops, int64_t rows, int64_t times, int threads);

// The same where a row is a token and attention reads the tokens before it (cu_queries is given): a thread takes
// a few whole sequences at a time through all ops, then through `last`, which have a row a sequence. Sequence s
// has the tokens bounds[s] .. bounds[s + 1] - 1.
void run_ops_on_sequences(const std::vector<RowOp>& ops, const std::vector<RowOp>& last,
                          const int32_t* bounds, int64_t sequences, int threads);

}  // namespace rlhf_fast
