// The machine as c10 sees it: the guard through which torch.Stream, torch.Event and autograd's engine work, and the
// allocators.
#include "streams.hpp"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace fake {

namespace {

Machine& m() {
  return Machine::get();
}

c10::Device at(int index) {
  return c10::Device(TYPE, static_cast<c10::DeviceIndex>(index));
}

int index_of(c10::Device device) {
  const int index = device.has_index() ? device.index() : Machine::device();
  TORCH_CHECK(index < m().devices(), "fake:", index, " does not exist: there are ", m().devices(),
              " fake devices; ask load() for more");
  return index;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    Machine::set_device(index_of(device));
    return before;
  }
  c10::Device getDevice() const override { return at(Machine::device()); }
  void setDevice(c10::Device device) const override { Machine::set_device(index_of(device)); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) Machine::set_device(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(m().devices()); }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    const int index = index_of(device);
    return stream_of(index, Machine::stream(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    const int index = index_of(device);
    return stream_of(index, static_cast<uint32_t>(index));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const int index = index_of(device);
    return stream_of(index, m().new_stream(index));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    Machine::set_stream(number(stream));
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  bool queryStream(const c10::Stream& stream) const override { return m().passed_all(number(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override {
    m().synchronize_stream(number(stream), "stream.synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override { m().synchronize_device(index); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    m().record(*static_cast<Event*>(*event), number(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) m().wait(number(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override { return event == nullptr || m().passed(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) m().synchronize(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* last, const c10::DeviceIndex) const override {
    const auto passed = static_cast<Event*>(last)->when - static_cast<Event*>(first)->when;
    return std::chrono::duration<double, std::milli>(passed).count();
  }

  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    m().record_stream(data.get(), number(stream));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- memory ---------------------------------------------------------------------------------------------------

void give_back(void* data) {
  m().release(data);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int device = Machine::device();
    void* data = m().allocate(device, Machine::stream(device), bytes);
    return {data, data, &give_back, at(device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    const uint32_t stream = Machine::stream(Machine::device());
    m().perform(stream, "a copy of storage", {{from, bytes, false, ""}, {to, bytes, true, ""}});
    default_copy_data(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { m().empty_cache(); }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    m().record_stream(data.get(), number(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    const Stats s = m().stats(device);
    c10::CachingDeviceAllocator::DeviceStats all;
    auto set = [](auto& stat, int64_t current, int64_t peak) { stat[0].current = current, stat[0].peak = peak; };
    set(all.allocation, s.blocks, s.blocks_peak);
    set(all.segment, s.segments, s.segments);
    set(all.active, s.blocks, s.blocks_peak);
    set(all.allocated_bytes, s.allocated, s.allocated_peak);
    set(all.active_bytes, s.allocated, s.allocated_peak);
    set(all.reserved_bytes, s.reserved, s.reserved_peak);
    set(all.requested_bytes, s.requested, s.requested_peak);
    return all;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}  // only current values and peaks are kept
  void resetPeakStats(c10::DeviceIndex device) override { m().reset_peak(device); }
};

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = m().allocate_pinned(bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

c10::AllocatorRegisterer<TYPE> registered(&device_memory);

}  // namespace

c10::Allocator* device_allocator() {
  return &device_memory;
}
c10::Allocator* pinned_allocator() {
  return &pinned_memory;
}

}  // namespace fake
