// Device selection and the state of the driver, as text. Linked against the static CUDA runtime, so
// _core depends on no CUDA library and loads on machines without a driver.
#pragma once

#include <string>

namespace rlhf_fast {

// "" if kernels of this build can run on `device`, otherwise the reason. Never throws.
std::string cuda_unusable_reason(int device);

// "2 devices, driver 13.0, runtime 13.0", or what the driver said. Never throws.
std::string cuda_status();

std::string cuda_toolkit_version();

}  // namespace rlhf_fast
