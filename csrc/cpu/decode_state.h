// What surrounds the forward of a decoding step: where each row's token goes, and what it drew.
#pragma once

#include "cpu/isa.h"
#include "host/tensor_view.h"

namespace rlhf_fast {

// Rows of the integer state [kFields, capacity]; rlhf_fast_kernels/decode_state.py has the same.
enum DecodeField { kSample, kToken, kContext, kStep, kLimit, kSeed, kTopK, kLive, kBroken };

struct PlaceTokensArgs {
  int64_t rows = 0;
  int64_t* state = nullptr;  // field f of row r is at f * field_stride + r
  int64_t field_stride = 0;
  const int32_t* page_table = nullptr;
  int64_t table_stride = 0;
  int64_t page_size = 0;
  int64_t* ids = nullptr;
  int64_t* positions = nullptr;
  int64_t* slots = nullptr;  // -1: nothing is stored
  int32_t* contexts = nullptr;
};

struct RecordTokensArgs {
  int64_t rows = 0;
  int64_t* state = nullptr;
  int64_t field_stride = 0;
  const int64_t* stops = nullptr;  // [rows, stop_width], padded with an id that no token has
  int64_t stop_width = 0;
  const int64_t* tokens = nullptr;  // drawn
  const float* logprobs = nullptr;
  const float* raw_logprobs = nullptr;
  int64_t columns = 0;  // of the completions
  int64_t* out_tokens = nullptr;
  float* out_logprobs = nullptr;
  float* out_raw_logprobs = nullptr;
  int64_t* out_lengths = nullptr;
  bool* out_ended = nullptr;
};

RLHF_FAST_CPU_OP(place_tokens, PlaceTokensArgs)
RLHF_FAST_CPU_OP(record_tokens, RecordTokensArgs)

}  // namespace rlhf_fast
