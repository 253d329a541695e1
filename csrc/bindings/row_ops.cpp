// Bound ops, alone and in sequence.
#include "bindings/row_ops.h"

#include <memory>

#include "bindings/arguments.h"
#include "bindings/families.h"

namespace rlhf_fast {
namespace {

struct BoundOps {
  std::vector<RowOp> ops;
  int64_t rows;
  int threads;
};

struct SequenceOps {
  std::vector<RowOp> ops;
  std::vector<RowOp> last;
  const int32_t* bounds;
  int64_t sequences;
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

bool asks_by_sequence(const RowOp& op) {
  const auto* attention = std::get_if<PagedAttentionArgs>(&op);
  return attention != nullptr && attention->cu_queries != nullptr;
}

bool has_inner_rows(const RowOp& op) {
  const auto* norm = std::get_if<RmsNormArgs>(&op);
  return norm != nullptr && norm->inner != 1;
}

// Those of `rows` rows each; attention by sequence, if it may be there, of `sequences`.
std::vector<RowOp> ops_of(const py::list& bound, int64_t rows, int64_t sequences) {
  std::vector<RowOp> ops;
  for (const py::handle each : bound) {
    const RowOp& op = each.cast<const BoundOp&>().op;
    if (rows_of(op) != (asks_by_sequence(op) ? sequences : rows) || has_inner_rows(op)) {
      throw std::invalid_argument("bound ops of different numbers of rows");
    }
    ops.push_back(op);
  }
  return ops;
}

BoundOps make_ops(const py::list& bound, int threads) {
  const int64_t rows = bound.empty() ? 0 : rows_of(bound[0].cast<const BoundOp&>().op);
  return {ops_of(bound, rows, -1), rows, threads};
}

SequenceOps make_sequence_ops(const py::list& bound, const py::list& last, uintptr_t bounds,
                              int64_t tokens, int64_t sequences, int threads) {
  return {ops_of(bound, tokens, sequences), ops_of(last, sequences, -1),
          reinterpret_cast<const int32_t*>(bounds), sequences, threads};
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
      .def(py::init(&make_ops))
      .def_readonly("rows", &BoundOps::rows)
      .def(
          "__call__",
          [](const BoundOps& self, int64_t rows, int64_t times) {
            if (rows < 0 || rows > self.rows) {
              throw std::invalid_argument("bound ops have fewer rows");
            }
            const py::gil_scoped_release release;
            return run_ops(self.ops, rows, times, self.threads);
          },
          py::arg("rows"), py::arg("times"));
  py::class_<SequenceOps>(m, "SequenceOps")
      .def(py::init(&make_sequence_ops))
      .def("__call__", [](const SequenceOps& self) {
        const py::gil_scoped_release release;
        run_ops_on_sequences(self.ops, self.last, self.bounds, self.sequences, self.threads);
      });
}

}  // namespace rlhf_fast
