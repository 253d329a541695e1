// Memory of the simulated devices, and pinned memory of the host.

#include <cstring>
#include <map>
#include <mutex>

#include "simulated.h"

namespace simulated {

int device_count = 1;
thread_local c10::DeviceIndex current_device = 0;
int64_t allocated[MOST_DEVICES] = {};
int64_t peak[MOST_DEVICES] = {};
int64_t capacity = int64_t{8} << 30;

namespace {

constexpr size_t GRANULE = 512;  // bytes, as the caching allocator rounds
std::mutex memory_mutex;
std::map<char*, size_t> device_blocks;
std::map<char*, size_t> pinned_blocks;
std::map<char*, std::vector<char>> before_capture;

struct Block {
  char* address;
  size_t bytes;
  c10::DeviceIndex device;
};

void nothing_to_free(void*) {}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    allocated[block->device] -= static_cast<int64_t>(block->bytes);
    device_blocks.erase(block->address);
    before_capture.erase(block->address);
  }
  free(block->address);
  delete block;
}

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t wanted) override {
    const c10::Device device(c10::kCUDA, current_device);
    if (wanted == 0) return {nullptr, nullptr, &nothing_to_free, device};
    const size_t bytes = (wanted + GRANULE - 1) / GRANULE * GRANULE;
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& held = allocated[current_device];
    TORCH_CHECK_WITH(OutOfMemoryError, held + static_cast<int64_t>(bytes) <= capacity,
                     "CUDA out of memory. Tried to allocate ", bytes, " bytes (simulated)");
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, GRANULE, bytes) == 0, "the host is out of memory");
    memset(memory, 0xAB, bytes);  // what nobody wrote is no zero
    auto* address = static_cast<char*>(memory);
    device_blocks[address] = bytes;
    held += static_cast<int64_t>(bytes);
    peak[current_device] = std::max(peak[current_device], held);
    return {address, new Block{address, bytes, current_device}, &free_block, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};
DeviceAllocator the_device_allocator;

void free_pinned(void* memory) {
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    pinned_blocks.erase(static_cast<char*>(memory));
    before_capture.erase(static_cast<char*>(memory));
  }
  free(memory);
}

struct PinnedAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &nothing_to_free, c10::Device(c10::kCPU)};
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, GRANULE, bytes) == 0, "the host is out of memory");
    std::lock_guard<std::mutex> lock(memory_mutex);
    pinned_blocks[static_cast<char*>(memory)] = bytes;
    return {memory, memory, &free_pinned, c10::Device(c10::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};
PinnedAllocator the_pinned_allocator;

}  // namespace

at::Allocator& device_allocator = the_device_allocator;
at::Allocator& pinned_allocator = the_pinned_allocator;

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto* wanted = const_cast<char*>(static_cast<const char*>(address));
  auto block = pinned_blocks.upper_bound(wanted);
  if (block == pinned_blocks.begin()) return false;
  --block;
  return wanted < block->first + block->second;
}

// A capture runs nothing: what was written meanwhile is taken back, new memory holds no numbers.
void remember_memory() {
  std::lock_guard<std::mutex> lock(memory_mutex);
  before_capture.clear();
  for (const auto* blocks : {&device_blocks, &pinned_blocks})
    for (const auto& [address, bytes] : *blocks)
      before_capture[address] = std::vector<char>(address, address + bytes);
}

void take_memory_back() {
  std::lock_guard<std::mutex> lock(memory_mutex);
  for (const auto& [address, data] : before_capture) memcpy(address, data.data(), data.size());
  for (const auto& [address, bytes] : device_blocks)
    if (!before_capture.count(address)) memset(address, 0xFF, bytes);
  before_capture.clear();
}

}  // namespace simulated

REGISTER_ALLOCATOR(c10::kCUDA, &simulated::the_device_allocator)
