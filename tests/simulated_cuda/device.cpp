// What PyTorch asks of a device: random numbers, the current device, streams.
//
// Loaded before `import torch`, because the registries that are entered here are read once.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

#include "simulated.h"

namespace simulated {

namespace {

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;
  DeviceGenerator(c10::DeviceIndex index, at::Generator generator)
      : c10::GeneratorImpl(c10::Device(c10::kCUDA, index),
                           c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(std::move(generator)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  static c10::DeviceType device_type() { return c10::kCUDA; }
  DeviceGenerator* clone_impl() const override {
    return new DeviceGenerator(device().index(), host.clone());
  }
};

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<DeviceGenerator>(
      index_of(index), at::detail::createCPUGenerator(c10::default_rng_seed_val));
}

}  // namespace

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < MOST_DEVICES; ++i) made.push_back(new_generator(i));
    return made;
  }();
  return all[index_of(index)];
}

at::Generator host_generator(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
}

}  // namespace simulated

namespace at {

struct SimulatedHooks : CUDAHooksInterface {
  explicit SimulatedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex i) const override {
    return simulated::default_generator(i);
  }
  Generator getNewGenerator(DeviceIndex i) const override { return simulated::new_generator(i); }
  bool isPinnedPtr(const void* address) const override { return simulated::is_pinned(address); }
  Allocator* getPinnedMemoryAllocator() const override { return &simulated::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &simulated::device_allocator; }
  DeviceIndex current_device() const override { return simulated::current_device; }
  DeviceIndex deviceCount() const override { return simulated::device_count; }
  int getNumGPUs() const override { return simulated::device_count; }
  DeviceIndex getCurrentDevice() const override { return simulated::current_device; }
  void setCurrentDevice(DeviceIndex device) const override { simulated::current_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(simulated::current_device, device);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return std::exchange(simulated::current_device, simulated::index_of(device));
  }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, simulated::current_device); }
  void deviceSynchronize(DeviceIndex) const override {}
};

namespace {
const bool hooks_registered = [] {
  CUDAHooksRegistry()->Register(
      "CUDAHooks",
      [](CUDAHooksArgs arguments) {
        return std::unique_ptr<CUDAHooksInterface>(new SimulatedHooks(arguments));
      },
      "simulated");
  return true;
}();
}  // namespace

}  // namespace at

namespace simulated {

namespace {

thread_local c10::StreamId current_stream[MOST_DEVICES] = {};
std::atomic<int64_t> streams_made{0};

c10::Stream stream_of(c10::Device device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, index_of(device.index())), id);
}

// Streams run in the order of their calls: who forgets to wait is not found out.
struct SimulatedGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  explicit SimulatedGuard(c10::DeviceType = static_type) {}
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {static_type, std::exchange(current_device, device.index())};
  }
  c10::Device getDevice() const override { return {static_type, current_device}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream_of(device, current_stream[index_of(device.index())]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream_of(device, ++streams_made);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream_of(device, ++streams_made);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(stream.device(),
                     std::exchange(current_stream[stream.device_index()], stream.id()));
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = &streams_made;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  bool isStreamCapturing(const c10::Stream&) const override { return capturing != nullptr; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard);

}  // namespace

}  // namespace simulated
