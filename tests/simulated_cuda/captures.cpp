// CUDA graphs: a capture records ops and launches and runs none, a replay runs them.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/utils/pybind.h>

#include "simulated.h"

namespace simulated {

Graph* capturing = nullptr;
int paused = 0;
int sync_mode = 0;

bool recording() { return capturing != nullptr && paused == 0; }

void waits_for_the_device(const std::string& what) {
  TORCH_CHECK(!recording(),
              "CUDA error: operation not permitted when stream is capturing (simulated): ", what);
  TORCH_CHECK(sync_mode != 2, "called a synchronizing CUDA operation (simulated): ", what);
  if (sync_mode == 1) TORCH_WARN("called a synchronizing CUDA operation (simulated): ", what);
}

void replay(const Graph& graph) {
  for (const auto& step : graph.steps) {
    if (step.call) {
      py::gil_scoped_acquire gil;
      step.call();
      continue;
    }
    Stack results(step.arguments.begin(), step.arguments.end());
    at::AutoDispatchBelowADInplaceOrView guard;
    step.op->callBoxed(&results);
    std::vector<Tensor> flat;
    for (const auto& result : results) {
      if (result.isTensorList())
        for (const Tensor& tensor : result.toTensorVector()) flat.push_back(tensor);
      else
        flat.push_back(result.isTensor() ? result.toTensor() : Tensor());
    }
    for (const auto& [position, target] : step.outputs) target.copy_(flat[position]);
  }
}

}  // namespace simulated

using namespace simulated;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("set_device_count", [](int count) { device_count = count; });
  module.def("device_count", [] { return device_count; });
  module.def("current_device", [] { return static_cast<int>(current_device); });
  module.def("set_device", [](int device) {
    TORCH_CHECK(device < device_count, "CUDA error: invalid device ordinal");
    current_device = device;
  });
  module.def("default_generator", [](int index) { return default_generator(index); });
  module.def("allocated", [](int index) { return allocated[index]; });
  module.def("peak", [](int index) { return peak[index]; });
  module.def("reset_peak", [](int index) { peak[index] = allocated[index]; });
  module.def("capacity", [] { return capacity; });
  module.def("resize_storage", [](const Tensor& over, int64_t bytes) {
    resize_storage(over.storage().unsafeGetStorageImpl(), bytes, over.get_device());
  });
  module.def("share_storage", [](const Tensor& over) {
    return share_block(over.storage().mutable_data());
  });
  module.def("map_storage", [](const Tensor& over, const std::string& path, int64_t bytes) {
    auto* storage = over.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(map_block(path, bytes, over.get_device()));
    storage->set_nbytes(bytes);
  });
  module.def("sync_mode", [] { return sync_mode; });
  module.def("set_sync_mode", [](int mode) { sync_mode = mode; });
  module.def("waits_for_the_device", &waits_for_the_device);
  module.def("capturing", [] { return capturing != nullptr; });
  module.def("recording", &recording);
  module.def("pause_recording", [](int by) { paused += by; });
  module.def("record_call",
             [](py::object call) { capturing->steps.push_back({{}, {}, {}, std::move(call)}); });
  py::class_<Graph>(module, "Graph")
      .def(py::init<>())
      .def("begin",
           [](Graph& graph) {
             TORCH_CHECK(capturing == nullptr, "a capture is under way");
             graph.steps.clear();
             remember_memory();
             capturing = &graph;
           })
      .def("end",
           [](Graph&) {
             capturing = nullptr;
             take_memory_back();
           })
      .def("replay",
           [](Graph& graph) {
             py::gil_scoped_release release;
             replay(graph);
           })
      .def("reset", [](Graph& graph) { graph.steps.clear(); });
}
