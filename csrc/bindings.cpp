// The pybind11 module rlhf_fast_kernels._core: what this build is, and the families of ops of csrc/bindings/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings/families.h"
#include "host/cpu_features.h"

#ifdef RLHF_FAST_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace rlhf_fast {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = RLHF_FAST_COMPILER;
#ifdef RLHF_FAST_WITH_CUDA
  info["cuda"] = cuda_toolkit_version();
  info["cuda_archs"] = RLHF_FAST_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

void bind_build(py::module_& m) {
  m.def("build_info", &build_info, "Compiler, CUDA toolkit and architectures of this build.");
  m.def("cpu_features", &describe_cpu, "The instruction set in use and those available.");
#ifdef RLHF_FAST_WITH_CUDA
  m.def("cuda_status", &cuda_status, "State of the CUDA driver as text; never raises.");
  m.def("cuda_unusable_reason", &cuda_unusable_reason,
        "'' if kernels of this build run on the device, otherwise why not; never raises.");
#else
  m.def("cuda_status", [] { return std::string("built without CUDA"); });
  m.def("cuda_unusable_reason", [](int) { return std::string("built without CUDA"); });
#endif
}

}  // namespace
}  // namespace rlhf_fast

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled ops of rlhf_fast_kernels; use the Python functions of that package instead.";
  rlhf_fast::bind_build(m);
  rlhf_fast::bind_rewards(m);
  rlhf_fast::bind_logprobs(m);
  rlhf_fast::bind_losses(m);
  rlhf_fast::bind_row_ops(m);
  rlhf_fast::bind_decoding(m);
  rlhf_fast::bind_attention(m);
  rlhf_fast::bind_layers(m);
  rlhf_fast::bind_host(m);
}
