// Bound ops, alone and in sequence.
#include "bindings/row_ops.h"

#include <memory>

#include "bindings/arguments.h"
#include "bindings/families.h"

namespace rlhf_fast {
namespace {

struct BoundOps {
  std::vector<RowOp> ops;
  int threads;
};

// Below this many elements an op is over before another thread would have got the GIL.
constexpr int64_t kElementsWithGil = 16384;

bool is_short(const PlaceTokensArgs&) { return true; }
bool is_short(const RecordTokensArgs&) { return true; }
bool is_short(const GatherRowsArgs& args) { return args.rows * args.row_bytes <= 4 * kElementsWithGil; }
bool is_short(const RmsNormArgs& args) { return args.rows * args.columns <= kElementsWithGil; }
bool is_short(const SiluMulArgs& args) { return args.rows * args.columns <= kElementsWithGil; }
template <class Args>
bool is_short(const Args&) {
  return false;
}

BoundOps make_sequence(const py::list& bound, int threads) {
  BoundOps sequence{{}, threads};
  for (const py::handle each : bound) sequence.ops.push_back(each.cast<const BoundOp&>().op);
  for (const RowOp& op : sequence.ops) {
    if (rows_of(op) != rows_of(sequence.ops.front())) {
      throw std::invalid_argument("BoundOps: ops of different numbers of rows");
    }
  }
  return sequence;
}

}  // namespace

void bind_row_ops(py::module_& m) {
  py::class_<BoundOp>(m, "BoundOp")
      .def("__call__", [](const BoundOp& self) {
        if (std::visit([](const auto& args) { return is_short(args); }, self.op)) {
          return run_op(self.op);
        }
        const py::gil_scoped_release release;
        run_op(self.op);
      });
  py::class_<BoundOps>(m, "BoundOps")
      .def(py::init(&make_sequence))
      .def("__call__", [](const BoundOps& self) {
        const py::gil_scoped_release release;
        run_ops(self.ops, self.threads);
      });
}

}  // namespace rlhf_fast
