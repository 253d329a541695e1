#pragma once

#include <string>

#include "cpu/whiten.h"

namespace rlhf_fast {

// Both launch on `stream` (a cudaStream_t) of `device`; all pointers in `args` are device pointers.
// They return "" or what the CUDA runtime said. Nothing is read back: `whiten` takes its statistics
// from device memory.
std::string masked_moments_cuda(const MaskedMomentsArgs& args, int device, void* stream);
std::string whiten_cuda(const WhitenArgs& args, int device, void* stream);

}  // namespace rlhf_fast
