// One thread: a few kilobytes.
#include "cpu/gather_rows.h"

#include <string.h>

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void gather_rows(const GatherRowsArgs& args) {
  const char* table = static_cast<const char*>(args.table);
  char* out = static_cast<char*>(args.out);
  for (int64_t n = 0; n < args.rows; ++n) {
    memcpy(out + n * args.out_stride, table + args.ids[n] * args.table_stride, args.row_bytes);
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
