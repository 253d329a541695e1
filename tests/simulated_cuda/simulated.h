// A CUDA device that is not there, for a CPU build of PyTorch: tensors say cuda:N, memory and
// arithmetic are the host's. What it refuses, a device refuses too; see __init__.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <pybind11/pybind11.h>

namespace simulated {

using at::Tensor;
using Stack = torch::jit::Stack;

constexpr int MOST_DEVICES = 8;
extern int device_count;
extern thread_local c10::DeviceIndex current_device;

inline c10::DeviceIndex index_of(c10::DeviceIndex index) {
  return index < 0 ? current_device : index;
}

class OnDevice {
 public:
  explicit OnDevice(c10::DeviceIndex index) : before_(current_device) { current_device = index; }
  ~OnDevice() { current_device = before_; }

 private:
  c10::DeviceIndex before_;
};

// memory.cpp
extern at::Allocator& device_allocator;
extern at::Allocator& pinned_allocator;
extern int64_t allocated[MOST_DEVICES];  // bytes
extern int64_t peak[MOST_DEVICES];
extern int64_t capacity;  // of each device
bool is_pinned(const void* address);
int share_block(void* address);  // the file that other processes open
at::DataPtr map_block(const std::string& path, size_t bytes, c10::DeviceIndex index);
void remember_memory();
void take_memory_back();

// device.cpp
const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator host_generator(const at::Generator& generator);

// captures.cpp
struct Step {
  std::optional<c10::OperatorHandle> op;
  std::vector<c10::IValue> arguments;              // tensors as seen from the host
  std::vector<std::pair<size_t, Tensor>> outputs;  // which result goes where
  pybind11::object call;                                 // or a launch of a kernel
};
struct Graph {
  std::vector<Step> steps;
};
extern Graph* capturing;
extern int paused;
extern int sync_mode;  // of torch.cuda.set_sync_debug_mode
bool recording();
void waits_for_the_device(const std::string& what);
void replay(const Graph& graph);

// ops.cpp
void resize_storage(c10::StorageImpl* storage, size_t bytes, c10::DeviceIndex index);

}  // namespace simulated
