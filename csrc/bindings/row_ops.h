// An op of a decoding step with its arguments, as Python holds it.
#pragma once

#include "host/row_ops.h"

namespace rlhf_fast {

// Not the variant itself: pybind11 would hand its alternatives to Python.
struct BoundOp {
  RowOp op;
};

}  // namespace rlhf_fast
