// Operators of the fake device: the CPU's, on CPU tensors that share the device tensors' memory.
//
//     fake tensors --- the same memory ---> CPU tensors --- the CPU's kernel ---> results --- copied ---> fake tensors
//
// So results have the CPU's bits. What the operator read and wrote is noted on the current stream first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "streams.hpp"

namespace fake {

std::string shape_of(const at::Tensor& tensor);
// The bytes between a tensor's first and last element.
Range range_of(const at::Tensor& tensor, bool write);
// A CPU tensor with the memory, shape and strides of a device tensor.
at::Tensor on_cpu(const at::Tensor& tensor);
void resize_storage(const c10::Storage& storage, size_t bytes);
at::Generator cpu_generator_of(const at::Generator& generator);  // of a generator of the device

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

}  // namespace fake
