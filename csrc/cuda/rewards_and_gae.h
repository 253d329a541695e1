#pragma once

#include <string>

#include "cpu/rewards_and_gae.h"

namespace rlhf_fast {

// Launches on `stream` (a cudaStream_t) of `device`; all pointers in `args` are device pointers.
// Returns "" or what the CUDA runtime said.
std::string rewards_and_gae_cuda(const RewardsAndGaeArgs& args, int device, void* stream);

}  // namespace rlhf_fast
