// Operators of the fake device, by the CPU's kernels on the same memory. See fallback.hpp.
#include "fallback.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <set>
#include <unordered_map>

namespace fake {

std::string shape_of(const at::Tensor& tensor) {
  std::string text = "[";
  for (int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

Range range_of(const at::Tensor& tensor, bool write) {
  size_t bytes = 0;
  if (tensor.numel() != 0) {
    bytes = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) bytes += (tensor.size(d) - 1) * tensor.stride(d);
    bytes *= tensor.itemsize();
  }
  return {bytes ? tensor.const_data_ptr() : nullptr, bytes, write, shape_of(tensor)};
}

namespace {

c10::Storage share(const c10::Storage& storage) {
  void* data = storage.mutable_data();
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      c10::DataPtr(data, c10::Device(c10::DeviceType::CPU)), c10::GetCPUAllocator(),
                      /*resizable=*/true);
}

at::Tensor with_storage(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  at::Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return result;
}

bool is_ours(const at::Tensor& t) {
  return t.defined() && t.device().type() == TYPE;
}

// Operators that make the host wait on a GPU, because a size or a value comes back.
const std::set<std::string>& waiting() {
  static const std::set<std::string> names = {
      "aten::nonzero",
      "aten::masked_select",
      "aten::_unique",
      "aten::_unique2",
      "aten::unique_dim",
      "aten::equal",
      "aten::unique_consecutive",
      "aten::unique_dim_consecutive",
      "aten::is_nonzero",
      "aten::bincount",
      "aten::repeat_interleave",
  };
  return names;
}

bool takes_indices(const std::string& name) {
  return name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
}

// One call of an operator: arguments on their way in, results on their way out.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), stack_(stack), name_(op.operator_name().name) {}

  void run() {
    const size_t count = schema_.arguments().size();
    const size_t first = stack_->size() - count;
    for (size_t i = 0; i < count; ++i) look_at((*stack_)[first + i], schema_.arguments()[i]);
    check_devices();
    const c10::DeviceGuard guard(device_);
    const uint32_t stream = Machine::stream(device_.index());
    if (!is_view()) Machine::get().perform(stream, name_.c_str(), ranges_);
    const bool copies = found_ && stranger_.defined();  // indices of the host
    // aten::index itself has called nonzero and copy_ for its indices before it comes here.
    if (waiting().count(name_) || (name_ != "aten::index" && (has_mask_ || copies)))
      Machine::get().synchronize_stream(stream, name_.c_str());

    for (size_t i = 0; i < count; ++i) bring_in((*stack_)[first + i]);
    call();
    for (auto& [ours, cpu] : tensors_) follow_resize(ours, cpu);
    for (size_t i = stack_->size() - schema_.returns().size(); i < stack_->size(); ++i) bring_out((*stack_)[i]);
    if (!made_.empty()) Machine::get().perform(stream, name_.c_str(), made_);
  }

 private:
  template <typename Visit>
  static void each(const c10::IValue& value, Visit visit) {
    if (value.isTensor()) {
      visit(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) visit(t);
    } else if (value.isOptionalTensorList()) {
      for (const auto& t : value.toOptionalTensorVector())
        if (t.has_value()) visit(*t);
    }
  }

  void look_at(const c10::IValue& value, const c10::Argument& argument) {
    const bool write = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    each(value, [&](const at::Tensor& t) {
      if (!t.defined()) return;
      if (is_ours(t)) {
        TORCH_CHECK(!found_ || t.device() == device_, name_, ": arguments on ", device_, " and on ", t.device(),
                    "; move them to one device");
        device_ = t.device();
        found_ = true;
        ranges_.push_back(range_of(t, write));
        const bool mask = t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
        if (mask && value.isOptionalTensorList()) has_mask_ = true;
      } else if (t.dim() > 0) {
        stranger_ = t;
      }
    });
    if (value.isGenerator() && value.toGenerator().device().type() == TYPE) generator_of_device_ = true;
    if (!found_ && value.isDevice() && value.toDevice().type() == TYPE) device_ = value.toDevice();
  }

  // As on a GPU: a CPU tensor may only be a number, or indices.
  void check_devices() {
    if (!device_.has_index()) device_ = c10::Device(TYPE, static_cast<c10::DeviceIndex>(Machine::device()));
    TORCH_CHECK(found_ || !stranger_.defined() || !generator_of_device_, name_,
                ": the generator is the fake device's, and the tensor is on ", stranger_.device(),
                "; make both for one device");
    TORCH_CHECK(!found_ || !stranger_.defined() || takes_indices(name_), name_,
                ": expected all tensors on the same device, but found one of shape ", stranger_.sizes(), " on ",
                stranger_.device(), " beside tensors on ", device_);
  }

  bool is_view() const {
    for (const auto& result : schema_.returns())
      if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
    return false;
  }

  at::Tensor in(const at::Tensor& t) {
    if (!is_ours(t)) return t;
    auto [entry, is_new] = storages_.try_emplace(t.storage().unsafeGetStorageImpl());
    if (is_new) entry->second = share(t.storage());
    at::Tensor cpu = with_storage(t, entry->second, c10::DispatchKey::CPU);
    tensors_.emplace_back(t, cpu);
    return cpu;
  }

  void bring_in(c10::IValue& value) {
    if (value.isTensor()) {
      value = in(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list = value.toTensorVector();
      for (at::Tensor& t : list) t = in(t);
      value = c10::IValue(std::move(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector()) list.push_back(t.has_value() ? std::optional(in(*t)) : t);
      value = c10::IValue(std::move(list));
    } else if (value.isDevice()) {
      if (value.toDevice().type() == TYPE) value = c10::IValue(c10::Device(c10::DeviceType::CPU));
    } else if (value.isGenerator()) {
      if (value.toGenerator().device().type() == TYPE) {
        value = c10::IValue(cpu_generator_of(value.toGenerator()));
        has_generator_ = true;
      }
    }
  }

  // Random numbers come from the device's generator, also where a kernel takes the CPU's default one.
  void call() {
    const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
    if (has_generator_ || !op_.hasTag(at::Tag::nondeterministic_seeded)) return op_.redispatchBoxed(cpu, stack_);
    at::Generator usual = at::detail::getDefaultCPUGenerator();
    at::Generator ours = cpu_generator_of(at::globalContext().defaultGenerator(device_));
    auto swap = [&] {
      std::scoped_lock lock(usual.mutex(), ours.mutex());
      const at::Tensor state = usual.get_state();
      usual.set_state(ours.get_state());
      ours.set_state(state);
    };
    swap();
    try {
      op_.redispatchBoxed(cpu, stack_);
    } catch (...) {
      swap();
      throw;
    }
    swap();
  }

  // out= arguments and the like may have been given another size, and other memory for it.
  void follow_resize(const at::Tensor& ours, const at::Tensor& cpu) {
    const c10::Storage &storage = ours.storage(), &theirs = cpu.storage();
    if (theirs.data() != storage.data() || theirs.nbytes() != storage.nbytes()) {
      resize_storage(storage, theirs.nbytes());
      std::memcpy(storage.mutable_data(), theirs.data(), theirs.nbytes());
    }
    if (ours.sizes() != cpu.sizes() || ours.strides() != cpu.strides() || ours.storage_offset() != cpu.storage_offset())
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

  at::Tensor out(const at::Tensor& cpu) {
    if (!cpu.defined() || cpu.device().type() != c10::DeviceType::CPU) return cpu;
    for (const auto& [ours, theirs] : tensors_)
      if (theirs.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) return ours;
    const auto* storage = cpu.storage().unsafeGetStorageImpl();
    for (const auto& [ours, theirs] : tensors_)
      if (theirs.storage().unsafeGetStorageImpl() == storage)
        return with_storage(cpu, ours.storage(), c10::DispatchKey::PrivateUse1);
    auto [entry, is_new] = results_.try_emplace(storage);
    if (is_new) {
      c10::Allocator* allocator = device_allocator();
      c10::DataPtr data = allocator->allocate(cpu.storage().nbytes());
      std::memcpy(data.get(), cpu.storage().data(), cpu.storage().nbytes());
      entry->second =
          c10::Storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(), std::move(data), allocator, true);
    }
    at::Tensor result = with_storage(cpu, entry->second, c10::DispatchKey::PrivateUse1);
    made_.push_back(range_of(result, true));
    return result;
  }

  void bring_out(c10::IValue& value) {
    if (value.isTensor()) {
      value = out(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list = value.toTensorVector();
      for (at::Tensor& t : list) t = out(t);
      value = c10::IValue(std::move(list));
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  const std::string name_;
  c10::Device device_{TYPE};
  bool found_ = false, has_mask_ = false, has_generator_ = false, generator_of_device_ = false;
  at::Tensor stranger_;
  std::vector<Range> ranges_, made_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // ours, and the CPU's view of it
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_, results_;
};

}  // namespace

at::Tensor on_cpu(const at::Tensor& tensor) {
  return with_storage(tensor, share(tensor.storage()), c10::DispatchKey::CPU);
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
  const size_t kept = std::min(bytes, storage.nbytes());
  const c10::DeviceGuard guard(storage.device());
  c10::DataPtr data = device_allocator()->allocate(bytes);
  if (kept != 0) device_allocator()->copy_data(data.get(), storage.data(), kept);
  impl->set_data_ptr_noswap(std::move(data));
  impl->set_nbytes(bytes);
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call(op, stack).run();
}

}  // namespace fake
