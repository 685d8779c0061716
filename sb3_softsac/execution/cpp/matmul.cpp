// The operator of matmul.py, behind matmul.h. Each thread computes rows of its own, the same in which Inductor's
// loops divide their work, so that what a thread reads is mostly what it has written.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

Tensor product(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias, bool relu,
               const std::optional<Tensor>& relu_of) {
  const Matrix a(left), b(right);
  TORCH_CHECK(a.columns == b.rows, "product of ", left.sizes(), " and ", right.sizes());
  Tensor out = at::empty({a.rows, b.columns}, left.options());
  float* c = out.mutable_data_ptr<float>();
  // Inductor may have chosen other strides than the graph had
  const Tensor bias_row = bias ? bias->contiguous() : Tensor(), made = relu_of ? relu_of->contiguous() : Tensor();
  const Epilogue epilogue{.bias = bias ? bias_row.const_data_ptr<float>() : nullptr,
                          .relu_of = relu_of ? made.const_data_ptr<float>() : nullptr,
                          .relu = relu};
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, a.columns * b.columns));
  at::parallel_for(0, a.rows, grain,
                   [&](int64_t begin, int64_t end) { rows_of_product(a, b, epilogue, begin, end, c); });
  return out;
}

}  // namespace

TORCH_LIBRARY(sb3_softsac, m) {
  m.def("product(Tensor a, Tensor b, Tensor? bias, bool relu, Tensor? relu_of) -> Tensor");
}
TORCH_LIBRARY_IMPL(sb3_softsac, CPU, m) { m.impl("product", &product); }
