// What torch asks of an accelerator besides operators and streams: generators, pinned memory, storage that is resized.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>

#include "fallback.hpp"

namespace fake {

namespace {

// A CPU generator of its own under the device's name.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(c10::DeviceIndex index, at::Generator cpu = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(c10::Device(TYPE, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(cpu)) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(device().index(), cpu.clone()); }

  at::Generator cpu;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(Machine::get().devices()); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(Machine::device()); }
  void setCurrentDevice(c10::DeviceIndex index) const override { Machine::set_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const c10::DeviceIndex before = getCurrentDevice();
    Machine::set_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }

  bool isPinnedPtr(const void* data) const override { return Machine::get().is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  c10::Device getDeviceFromPtr(void* data) const override {
    const int device = Machine::get().device_of_pointer(data);
    TORCH_CHECK(device >= 0, "this memory is not on a fake device");
    return c10::Device(TYPE, static_cast<c10::DeviceIndex>(device));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static std::vector<at::Generator>* all = [] {
      auto* list = new std::vector<at::Generator>;
      for (int i = 0; i < Machine::get().devices(); ++i) list->push_back(at::make_generator<DeviceGenerator>(i));
      return list;
    }();
    return all->at(index < 0 ? Machine::device() : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? getCurrentDevice() : index);
  }
};

}  // namespace

at::Generator cpu_generator_of(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

void register_hooks() {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

}  // namespace fake

// For torch.fake.get_rng_state and set_rng_state. `bytes`: the state's size, or -1 to ask for it.
extern "C" int64_t fake_rng_state(int device, void* state, int64_t bytes, int set) {
  at::Generator generator =
      at::detail::getPrivateUse1Hooks().getDefaultGenerator(static_cast<c10::DeviceIndex>(device));
  at::Tensor now = generator.get_state();
  if (bytes != now.numel()) return now.numel();
  if (set) {
    std::memcpy(now.mutable_data_ptr(), state, bytes);
    generator.set_state(now);
  } else {
    std::memcpy(state, now.const_data_ptr(), bytes);
  }
  return bytes;
}

extern "C" void fake_seed(int device, uint64_t seed) {
  at::Generator generator =
      at::detail::getPrivateUse1Hooks().getDefaultGenerator(static_cast<c10::DeviceIndex>(device));
  generator.set_current_seed(seed);
}
