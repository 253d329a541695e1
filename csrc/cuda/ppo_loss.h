#pragma once

#include <string>

#include "cpu/ppo_loss.h"

namespace rlhf_fast {

// A number on the device, or (`data` null) none. The values are part of the Python interface.
struct DeviceNumber {
  enum class Type : int32_t { f32 = 0, f64 = 1, i64 = 2 };
  const void* data = nullptr;
  Type type = Type::f32;
};

// Doubles of workspace that a call needs; Python allocates it.
int64_t ppo_loss_workspace(int64_t tokens);

// Two launches on `stream` (a cudaStream_t) of `device`; all pointers are device pointers. Without a
// `normalizer` on the device, args.normalizer counts. Returns "" or what the CUDA runtime said.
std::string ppo_loss_cuda(const PpoLossArgs& args, const DeviceNumber& normalizer,
                          double* workspace, int device, void* stream);

// The gradients times the upstream gradient, which is read on the device.
struct PpoScaleArgs {
  static constexpr int kGradients = 4;
  int64_t tokens = 0;
  const float* upstream = nullptr;
  const float* from[kGradients] = {};  // null: none
  TokenTensor to[kGradients];          // data is written; aligned like `from` to 16 bytes
};

std::string ppo_loss_scale_cuda(const PpoScaleArgs& args, int device, void* stream);

}  // namespace rlhf_fast
