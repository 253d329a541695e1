// Memory of the simulated devices, which other processes can map, and pinned memory of the host.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

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
constexpr size_t PAGE = 4096;    // what another process can map
std::mutex memory_mutex;
std::map<char*, size_t> device_blocks;
std::map<char*, int> shared_blocks;  // and their files
std::map<char*, size_t> pinned_blocks;
std::map<char*, std::vector<char>> before_capture;

struct Block {
  char* address;
  size_t bytes;
  c10::DeviceIndex device;
};

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void nothing_to_free(void*) {}

void* map_pages(void* address, size_t bytes, int flags, int file) {
  void* memory = mmap(address, rounded(bytes, PAGE), PROT_READ | PROT_WRITE, flags, file, 0);
  TORCH_CHECK(memory != MAP_FAILED, "cannot map ", bytes, " bytes: ", strerror(errno));
  return memory;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    allocated[block->device] -= static_cast<int64_t>(block->bytes);
    device_blocks.erase(block->address);
    before_capture.erase(block->address);
    const auto shared = shared_blocks.find(block->address);
    if (shared != shared_blocks.end()) {  // who has mapped it keeps it; this address is free for all
      map_pages(block->address, block->bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1);
      close(shared->second);
      shared_blocks.erase(shared);
    }
  }
  free(block->address);
  delete block;
}

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t wanted) override {
    const c10::Device device(c10::kCUDA, current_device);
    if (wanted == 0) return {nullptr, nullptr, &nothing_to_free, device};
    const size_t bytes = rounded(wanted, GRANULE);
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& held = allocated[current_device];
    TORCH_CHECK_WITH(OutOfMemoryError, held + static_cast<int64_t>(bytes) <= capacity,
                     "CUDA out of memory. Tried to allocate ", bytes, " bytes (simulated)");
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, PAGE, rounded(bytes, PAGE)) == 0,
                "the host is out of memory");
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

int share_block(void* address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto* start = static_cast<char*>(address);
  const auto shared = shared_blocks.find(start);
  if (shared != shared_blocks.end()) return shared->second;
  const auto block = device_blocks.find(start);
  TORCH_CHECK(block != device_blocks.end(), "only memory of this process can be shared");
  const int file = memfd_create("simulated_cuda", MFD_CLOEXEC);
  TORCH_CHECK(file >= 0 && ftruncate(file, rounded(block->second, PAGE)) == 0, strerror(errno));
  void* copy = map_pages(nullptr, block->second, MAP_SHARED, file);
  memcpy(copy, start, block->second);
  munmap(copy, rounded(block->second, PAGE));
  map_pages(start, block->second, MAP_SHARED | MAP_FIXED, file);
  return shared_blocks[start] = file;
}

at::DataPtr map_block(const std::string& path, size_t bytes, c10::DeviceIndex index) {
  struct Mapped {
    void* address;
    size_t bytes;
  };
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  TORCH_CHECK(file >= 0, "CUDA error: invalid resource handle (simulated)");
  void* memory = map_pages(nullptr, bytes, MAP_SHARED, file);
  close(file);
  const auto unmap = [](void* context) {
    auto* mapped = static_cast<Mapped*>(context);
    munmap(mapped->address, rounded(mapped->bytes, PAGE));
    delete mapped;
  };
  return {memory, new Mapped{memory, bytes}, unmap, c10::Device(c10::kCUDA, index)};
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
