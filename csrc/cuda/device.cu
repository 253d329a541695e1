#include "cuda/device.h"

#include "cuda/device_guard.h"

namespace rlhf_fast {
namespace {

__global__ void probe_kernel() {}

std::string describe(cudaError_t error) {
  cudaGetLastError();  // clears the sticky-until-read state that the failed call left
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

std::string cuda_unusable_reason(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return describe(guard.error());
  // Loads the image without launching: fails with cudaErrorNoKernelImageForDevice when this build has
  // neither code nor PTX for the device.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  return error == cudaSuccess ? "" : describe(error);
}

std::string cuda_status() {
  int driver = 0, devices = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return "no CUDA driver installed";
  if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return describe(error);
  return std::to_string(devices) + (devices == 1 ? " device" : " devices") + ", driver " +
         version(driver) + ", runtime " + cuda_toolkit_version();
}

std::string cuda_toolkit_version() { return version(CUDART_VERSION); }

}  // namespace rlhf_fast
