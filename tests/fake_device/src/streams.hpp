// Between torch's streams and the machine's numbers, and the allocator: what the files that speak torch share.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Stream.h>

#include "machine.hpp"

namespace fake {

constexpr c10::DeviceType TYPE = c10::DeviceType::PrivateUse1;

// torch wants 0 for the default stream of every device; a machine's numbers are unique over devices.
inline uint32_t number(const c10::Stream& s) {
  return s.id() == 0 ? static_cast<uint32_t>(s.device_index()) : static_cast<uint32_t>(s.id());
}

inline c10::Stream stream_of(int device, uint32_t number) {
  const bool is_default = number == static_cast<uint32_t>(device);
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(TYPE, static_cast<c10::DeviceIndex>(device)),
                     is_default ? 0 : static_cast<c10::StreamId>(number));
}

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();

}  // namespace fake
