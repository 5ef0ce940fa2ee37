// What the fallback cannot do: memory, views, copies between devices, values for the host.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "fallback.hpp"

namespace fake {

namespace {

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

c10::Device device_or_current(std::optional<c10::Device> device) {
  if (device.has_value() && device->has_index()) return *device;
  return c10::Device(TYPE, static_cast<c10::DeviceIndex>(Machine::device()));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "only CPU tensors can be pinned, not those of the fake device");
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, device_allocator(), KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "only CPU tensors can be pinned, not those of the fake device");
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), KEYS, c10::dtype_or_default(dtype));
}

// The storage grows if the shape needs it, and never shrinks.
void fit_storage(const at::Tensor& self) {
  const size_t need = self.numel() == 0 ? 0
                                        : at::detail::computeStorageNbytes(self.sizes(), self.strides(),
                                                                           self.itemsize(), self.storage_offset());
  if (self.storage().nbytes() < need) resize_storage(self.storage(), need);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) impl->set_sizes_contiguous(size);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  fit_storage(self);
  return self;
}

at::Tensor& set_shaped(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                       at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  fit_storage(self);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_shaped(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  if (self.is_same(source)) return self;
  return set_shaped(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, device_allocator(), true));
}

// ---- copies ---------------------------------------------------------------------------------------------------

uint32_t current(const at::Tensor& t) {
  return Machine::stream(t.device().index());
}

// Between two devices: on the source's stream, with the destination's before and after it, as CUDA does it.
void across(const at::Tensor& from, const at::Tensor& to) {
  Machine& m = Machine::get();
  Event ready, done;
  m.record(ready, current(to));
  m.wait(current(from), ready);
  m.perform(current(from), "aten::copy_ (between devices)", {range_of(from, false), range_of(to, true)});
  on_cpu(to).copy_(on_cpu(from));
  m.record(done, current(from));
  m.wait(current(to), done);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  Machine& m = Machine::get();
  const bool from_host = from.device().is_cpu(), to_host = to.device().is_cpu();
  if (from_host || to_host) {
    const at::Tensor &ours = from_host ? to : from, &host = from_host ? from : to;
    const bool pinned = m.is_pinned(host.const_data_ptr());
    m.perform(current(ours), from_host ? "aten::copy_ (host to device)" : "aten::copy_ (device to host)",
              {range_of(from, false), range_of(to, true)});
    const at::Tensor cpu = on_cpu(ours);
    if (from_host)
      cpu.copy_(host);
    else
      host.copy_(cpu);
    // Memory that is not pinned is staged: its contents are taken before the call returns, and come back in it.
    if (!non_blocking || (to_host && !pinned))
      m.synchronize_stream(current(ours),
                           from_host ? "blocking copy, host to device" : "blocking copy, device to host");
  } else if (from.device() != to.device()) {
    across(from, to);
  } else {
    m.perform(current(to), "aten::copy_", {range_of(from, false), range_of(to, true)});
    on_cpu(to).copy_(on_cpu(from));
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  Machine& m = Machine::get();
  m.perform(current(self), "aten::item", {range_of(self, false)});
  m.synchronize_stream(current(self), "aten::item");
  return at::_local_scalar_dense(on_cpu(self));
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  Machine::get().record_stream(self.storage().data(), number(stream));
}

// module.to(device) keeps parameters, and so ties between them, where this holds: between the CPU and a GPU it does.
bool may_replace_data(const at::Tensor&, const at::Tensor& from) {
  return from.layout() == at::kStrided;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_shaped);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("record_stream", &record_stream);
  m.impl("_has_compatible_shallow_copy_type", &may_replace_data);
  // These have a general kernel made of others, which rounds otherwise than the CPU's own.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace fake
