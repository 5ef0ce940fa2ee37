// Scaled dot-product attention: fused where the CPU would fuse it, so that the bits and the memory are those.
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <torch/library.h>

#include "fallback.hpp"

namespace fake {

namespace {

using at::Tensor;

int64_t choose(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
               double dropout, bool causal, std::optional<double> scale, bool grouped) {
  const auto math = static_cast<int64_t>(sdp::SDPBackend::math);
  if (grouped || (mask.has_value() && mask->requires_grad())) return math;
  const auto cpu_mask = mask.has_value() ? std::optional(on_cpu(*mask)) : std::nullopt;
  const int64_t choice =
      at::_fused_sdp_choice(on_cpu(query), on_cpu(key), on_cpu(value), cpu_mask, dropout, causal, scale);
  return choice == math ? math : static_cast<int64_t>(sdp::SDPBackend::overrideable);
}

// What GPUs return besides output and log-sum-exp (lengths, random state, debug mask) is left out.
std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double dropout,
    bool causal, bool, std::optional<double> scale) {
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, bias, scale);
  return {out, lse, Tensor(), Tensor(), query.size(2), key.size(2), Tensor(), Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& bias, std::array<bool, 4>,
                                                    const Tensor& out, const Tensor& lse, const Tensor&, const Tensor&,
                                                    c10::SymInt, c10::SymInt, double dropout, bool causal,
                                                    const Tensor&, const Tensor&, std::optional<double> scale) {
  const auto mask = bias.defined() ? std::optional(bias) : std::nullopt;
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, query, key, value, out, lse, dropout,
                                                                            causal, mask, scale);
  return {q, k, v, Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", &forward);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &backward);
}

}  // namespace fake

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &fake::choose)
}  // namespace at::native
