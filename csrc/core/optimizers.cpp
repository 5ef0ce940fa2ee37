// The Python face of the optimizer kernels. Segments come as a table of 64-bit words in memory, so that a model of
// thousands of parameters costs one integer to hand over.
#include "../cpu/optimizers.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace distlib;

namespace {

static_assert(sizeof(Segment) == 6 * sizeof(uint64_t) && sizeof(Squares::Run) == 2 * sizeof(uint64_t),
              "tables of 64-bit words are read as these");

// (hyper, dtype of parameters, dtype of gradients, copy, address of the table, rows)
using BatchOf = std::tuple<Hyper, int, int, int, uintptr_t, size_t>;
using SquaresOf = std::tuple<int, uintptr_t, size_t>;

void update_all(const std::vector<BatchOf>& given, int threads) {
  std::vector<Batch> batches;
  for (const auto& [hyper, param, grad, copy, table, rows] : given) {
    const auto* segments = reinterpret_cast<const Segment*>(table);
    batches.push_back({hyper, DType(param), DType(grad), Copy(copy), segments, rows});
    if (const char* why = unsupported(batches.back())) throw py::value_error(why);
  }
  py::gil_scoped_release release;
  update(batches.data(), batches.size(), threads);
}

double square_all(const std::vector<SquaresOf>& given, int threads) {
  std::vector<Squares> squares;
  for (const auto& [dtype, table, rows] : given) {
    if (dtype < 0 || dtype >= kGradTypes) throw py::value_error("only fp32, fp64, fp16 and bf16 can be squared");
    squares.push_back({DType(dtype), reinterpret_cast<const Squares::Run*>(table), rows});
  }
  py::gil_scoped_release release;
  return sum_of_squares(squares.data(), squares.size(), threads);
}

}  // namespace

void bind_optimizers(py::module_& m) {
  py::enum_<Rule>(m, "Rule").value("ADAMW", Rule::ADAMW).value("SGD", Rule::SGD).value("LION", Rule::LION);
  py::class_<Hyper>(m, "Hyper")
      .def(py::init([](Rule rule, double scale, double rate, double decay, double l2, double beta1, double beta2,
                       double eps, double root_scale, double momentum, double dampening, bool nesterov, bool first) {
             return Hyper{rule, scale,      rate,     decay,     l2,       beta1, beta2,
                          eps,  root_scale, momentum, dampening, nesterov, first};
           }),
           py::kw_only(), py::arg("rule"), py::arg("scale") = 1.0, py::arg("rate") = 0.0, py::arg("decay") = 1.0,
           py::arg("l2") = 0.0, py::arg("beta1") = 0.0, py::arg("beta2") = 0.0, py::arg("eps") = 0.0,
           py::arg("root_scale") = 1.0, py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
           py::arg("nesterov") = false, py::arg("first") = false);
  m.def(
      "optimizer_update", &update_all, py::arg("batches"), py::arg("threads"),
      "One step of all batches (hyper, parameter dtype, gradient dtype, copy 0|1 bf16|2 fp16, address, rows). A row is "
      "six words: addresses of parameter, gradient, m, v, copy (0: none), then elements.");
  m.def("sum_of_squares", &square_all, py::arg("squares"), py::arg("threads"),
        "Of all (dtype, address, rows), in fp64. A row is two words: address, elements.");
}
