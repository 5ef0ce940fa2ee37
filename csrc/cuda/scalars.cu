// The scalars of a step: one thread writes them, of the host's numbers or of the device's.
#include <cmath>

#include "elements.cuh"
#include "launch.cuh"
#include "optimizer.h"

namespace distlib {
namespace cuda {
namespace {

enum Rule : int64_t { ADAMW = 0, SGD = 1, LION = 2 };

__global__ void scalars_kernel(DistlibScalars* to, const DistlibScalars given) {
  *to = given;
}

__global__ void prepare_kernel(DistlibScalars* to, const DistlibPrepare given) {
  DistlibScalars s = {};
  s.scale = given.scale;
  if (given.loss_scale != nullptr) s.scale = s.scale * (1.0 / static_cast<double>(*given.loss_scale));
  if (given.squares != nullptr) {
    const double norm = sqrt(*given.squares) * s.scale;
    if (given.norm != nullptr) *given.norm = norm;
    if (given.max_norm != 0) {
      const double factor = given.max_norm / (norm + 1e-6);
      s.scale = s.scale * (factor > 1 ? 1.0 : factor);  // a NaN stays
    }
  }
  if (given.maximize != 0) s.scale = -s.scale;
  s.skip = given.found_inf != nullptr && *given.found_inf != 0;
  double step = given.step;
  if (given.device_step != nullptr) {
    step = static_cast<double>(*given.device_step) + 1;
    if (s.skip == 0) *given.device_step = static_cast<float>(step);
  }
  const double lr = given.device_lr == nullptr ? given.lr : static_cast<double>(*given.device_lr);
  s.rate = lr;
  s.decay = 1;
  s.root_scale = 1;
  s.beta1 = given.beta1;
  s.beta2 = given.beta2;
  s.eps = given.eps;
  if (given.rule == ADAMW) {
    s.rate = lr / (1 - pow(given.beta1, step));
    s.decay = 1 - lr * given.weight_decay;
    s.root_scale = pow(1 - pow(given.beta2, step), -0.5);
  } else {
    s.l2 = given.weight_decay;
    s.momentum = given.momentum;
    s.dampening = given.dampening;
    s.nesterov = given.nesterov;
    s.first = step == 1;
  }
  *to = s;
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

DISTLIB_API int64_t distlib_cuda_step_scalars(void* scalars, const DistlibScalars* given, void* stream) {
  using namespace distlib::cuda;
  DL_LAUNCH(scalars_kernel, 1, 1, as_stream(stream), static_cast<DistlibScalars*>(scalars), *given);
  return launched();
}

DISTLIB_API int64_t distlib_cuda_step_prepare(void* scalars, const DistlibPrepare* given, void* stream) {
  using namespace distlib::cuda;
  if (given->rule < ADAMW || given->rule > LION || (given->max_norm != 0 && given->squares == nullptr))
    return cudaErrorInvalidValue;
  DL_LAUNCH(prepare_kernel, 1, 1, as_stream(stream), static_cast<DistlibScalars*>(scalars), *given);
  return launched();
}
