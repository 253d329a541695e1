// A few dozen integers a row: one thread, one pass.
#include "cpu/decode_state.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void place_tokens(const PlaceTokensArgs& args) {
  const auto field = [&](DecodeField f) { return args.state + f * args.field_stride; };
  int64_t* contexts = field(kContext);
  const int64_t* live = field(kLive);
  const int64_t* tokens = field(kToken);
  for (int64_t r = 0; r < args.rows; ++r) {
    contexts[r] += live[r];
    const int64_t position = contexts[r] - 1;
    const int64_t page = args.page_table[r * args.table_stride + position / args.page_size];
    args.positions[r] = position;
    args.slots[r] = live[r] > 0 ? page * args.page_size + position % args.page_size : -1;
    args.contexts[r] = static_cast<int32_t>(contexts[r]);
    args.ids[r] = tokens[r] < 0 ? 0 : tokens[r];
  }
}

void record_tokens(const RecordTokensArgs& args) {
  const auto field = [&](DecodeField f) { return args.state + f * args.field_stride; };
  const int64_t* samples = field(kSample);
  const int64_t* limits = field(kLimit);
  int64_t* kept = field(kToken);
  int64_t* steps = field(kStep);
  int64_t* live = field(kLive);
  int64_t* broken = field(kBroken);
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t token = args.tokens[r];
    kept[r] = token;
    if (live[r] == 0) continue;
    const int64_t sample = samples[r];
    const int64_t at = sample * args.columns + steps[r];
    args.out_tokens[at] = token;
    args.out_logprobs[at] = args.logprobs[r];
    args.out_raw_logprobs[at] = args.raw_logprobs[r];
    args.out_lengths[sample] = ++steps[r];
    bool ended = false;
    for (int64_t i = 0; i < args.stop_width; ++i) {
      ended |= args.stops[r * args.stop_width + i] == token;
    }
    const bool unusable = token < 0;
    ended = ended && !unusable;
    if (ended) args.out_ended[sample] = true;
    if (unusable) broken[r] = 1;
    live[r] = !ended && !unusable && steps[r] < limits[r];
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
