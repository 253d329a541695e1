// The PPO losses.
#include "bindings/families.h"

#include <limits>
#include <tuple>

#include "bindings/arguments.h"
#include "cpu/ppo_loss.h"

#ifdef RLHF_FAST_WITH_CUDA
#include "cuda/ppo_loss.h"
#endif

namespace rlhf_fast {
namespace {

TokenTensor to_tokens(const py::tuple& tensors, size_t index) {
  TokenTensor tensor;
  if (tensors[index].is_none()) return tensor;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensors[index]);
  tensor.data = pointer<const void>(fields[0]);
  tensor.dtype = static_cast<DType>(fields[1].cast<int32_t>());
  return tensor;
}

void set_ppo_tensors(PpoLossArgs& args, const py::tuple& tensors) {
  args.logprobs = to_tokens(tensors, 0);
  args.old_logprobs = to_tokens(tensors, 1);
  args.advantages = to_tokens(tensors, 2);
  args.entropy = to_tokens(tensors, 3);
  args.ref_logprobs = to_tokens(tensors, 4);
  args.weights = to_tokens(tensors, 5);
  args.values = to_tokens(tensors, 6);
  args.old_values = to_tokens(tensors, 7);
  args.returns = to_tokens(tensors, 8);
  args.kl = to_tokens(tensors, 9);
}

void set_ppo_settings(PpoLossArgs& args, const py::tuple& settings) {
  const auto number = [&settings](size_t index) {
    return settings[index].is_none() ? std::numeric_limits<double>::infinity()
                                     : settings[index].cast<double>();
  };
  args.clip_eps_low = number(0);
  args.clip_eps_high = number(1);
  args.dual_clip = number(2);
  args.entropy_coef = number(3);
  args.kl_coef = number(4);
  args.kl_estimator = static_cast<KlEstimator>(settings[5].cast<int32_t>());
  args.own_kl_gradient = settings[6].cast<bool>();
  args.value_clip_eps = number(7);
  args.value_coef = number(8);
  args.log_ratio_clamp = number(9);
  if (settings[7].is_none()) args.old_values = TokenTensor();
}

// normalizer: a number, or (address on the device, its type); placement: number of CPU threads, or
// (CUDA device, stream handle, address of the workspace).
void run_ppo_loss(PpoLossArgs& args, py::handle normalizer, py::handle placement) {
  if (py::isinstance<py::int_>(placement)) {
    args.normalizer = normalizer.cast<double>();
    args.threads = placement.cast<int>();
    const py::gil_scoped_release release;
    ppo_loss(args);
    return;
  }
#ifdef RLHF_FAST_WITH_CUDA
  DeviceNumber on_device;
  if (py::isinstance<py::tuple>(normalizer)) {
    const auto [address, type] = normalizer.cast<std::pair<uintptr_t, int32_t>>();
    on_device.data = reinterpret_cast<const void*>(address);
    on_device.type = static_cast<DeviceNumber::Type>(type);
  } else {
    args.normalizer = normalizer.cast<double>();
  }
  const auto [device, stream, workspace] =
      placement.cast<std::tuple<int, uintptr_t, uintptr_t>>();
  std::string error;
  {
    const py::gil_scoped_release release;
    error = ppo_loss_cuda(args, on_device, reinterpret_cast<double*>(workspace), device,
                          reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("ppo_loss (cuda): " + error);
#else
  throw std::runtime_error("ppo_loss (cuda): this build has no CUDA code");
#endif
}

}  // namespace

void bind_losses(py::module_& m) {
  m.def("ppo_loss", [](const py::tuple& tensors, uintptr_t mask, int64_t tokens,
                       py::handle normalizer, const py::tuple& settings, const py::tuple& outputs,
                       py::handle placement) {
    PpoLossArgs args;
    args.tokens = tokens;
    args.mask = reinterpret_cast<const uint8_t*>(mask);
    set_ppo_tensors(args, tensors);
    set_ppo_settings(args, settings);
    args.loss = pointer<float>(outputs[0]);
    args.sums = pointer<float>(outputs[1]);
    args.extrema = pointer<float>(outputs[2]);
    args.d_logprobs = pointer<float>(outputs[3]);
    args.d_entropy = pointer<float>(outputs[4]);
    args.d_values = pointer<float>(outputs[5]);
    args.d_kl = pointer<float>(outputs[6]);
    run_ppo_loss(args, normalizer, placement);
  });
#ifdef RLHF_FAST_WITH_CUDA
  m.def("ppo_loss_workspace", &ppo_loss_workspace, "Doubles that a CUDA call works in.");
  // from: four addresses or 0; to: as many (address, dtype) or None.
  m.def("ppo_loss_scale", [](const py::tuple& from, const py::tuple& to, int64_t tokens,
                             uintptr_t upstream, int device, uintptr_t stream) {
    PpoScaleArgs args;
    args.tokens = tokens;
    args.upstream = reinterpret_cast<const float*>(upstream);
    for (int k = 0; k < PpoScaleArgs::kGradients; ++k) {
      args.from[k] = pointer<const float>(from[k]);
      args.to[k] = to_tokens(to, k);
    }
    std::string error;
    {
      const py::gil_scoped_release release;
      error = ppo_loss_scale_cuda(args, device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("ppo_loss (cuda): " + error);
  });
#endif
}

}  // namespace rlhf_fast
