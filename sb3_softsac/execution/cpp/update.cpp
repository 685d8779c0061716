// Updates of plain SAC on the CPU, and actions of its actor, see update.py. It is compiled behind matmul.h.
//
// All threads go through the updates together, and synchronise only on data dependences. Otherwise, cross-core traffic
// dominates: reading what another core has written. So the same threads do the work of a critic from beginning to end, as
// many critics at a time as the threads can be divided among. What several threads share, always the actor, is divided by
// rows of the minibatch: each thread computes the gradients of its own rows, and then adds all threads' gradients of a
// part of the parameters.

#include <omp.h>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <torch/custom_class.h>

#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

template <typename T>
struct InWholeCacheLines {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t(64)); }
  bool operator==(const InWholeCacheLines&) const { return true; }
};

using Floats = std::vector<float, InWholeCacheLines<float>>;
using Tensors = std::vector<Tensor>;

constexpr int64_t OF_PARAMETER = 4;  // tensors that come with each, if it is trained
constexpr float LOG_2 = 0.693147180559945f, HALF_LOG_2PI = 0.918938533204673f;
constexpr int64_t FEW_ROWS = 3;      // for which the weights are not packed: that would take longer

struct Range {
  int64_t begin, end;
};

Range share(int64_t n, int64_t member, int64_t size) { return {n * member / size, n * (member + 1) / size}; }

Range intersection(Range a, Range b) {
  const int64_t begin = std::min(std::max(a.begin, b.begin), a.end);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

// Threads that share some work, as one of them sees it
struct Crew {
  int64_t member, size;

  Range of(int64_t n) const { return share(n, member, size); }

  // For all others. Each thread has a crew of this size, and comes here as often
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// All threads, and those that do the same critics' work
struct Team {
  int64_t n_teams, first_critic;
  Crew all, mates;

  Team(int64_t thread, int64_t n_threads, int64_t n_critics)
      : n_teams(std::gcd(n_threads, n_critics)),
        first_critic(thread % n_teams),
        all{thread, n_threads},
        mates{thread / n_teams, n_threads / n_teams} {}
};

// Keeps what is there, and does not give memory back: that for a few rows is the same as for many
void reserve_values(Floats& values, size_t n) {
  if (values.size() < n) values.resize(n);
}

// Whether it is a contiguous one of n float32 on the CPU
bool is_plain(const Tensor& tensor, int64_t n) {
  return tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == n;
}

// Calls f(first, n) for each vector of up to LANES elements.
template <typename F>
void each_vector(Range range, const F& f) {
  for (int64_t i = range.begin; i < range.end; i += LANES) f(i, std::min(LANES, range.end - i));
}

// From a to b; as torch's, exact at both ends
Vec lerp(const Vec& a, const Vec& b, float weight) {
  const Vec difference = b - a;
  return weight < 0.5f ? at::vec::fmadd(Vec(weight), difference, a) : b - difference * Vec(1.0f - weight);
}

float sum_of(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; }, values);
}

// Sums over rows, with or without weights, of a matrix's columns
void column_sums(const float* weights, const float* matrix, int64_t columns, Range rows, float* out) {
  each_vector({0, columns}, [&](int64_t j, int64_t n) {
    Vec sum(0.0f);
    for (int64_t row = rows.begin; row < rows.end; row++) {
      sum = at::vec::fmadd(Vec(weights ? weights[row] : 1.0f), Vec::loadu(matrix + row * columns + j, n), sum);
    }
    sum.store(out + j, n);
  });
}

// Options of Adam or AdamW
struct Adam {
  double learning_rate, beta1, beta2, eps, weight_decay, is_decoupled;
};

// What keeps log_std within bounds, as in policies.Actor
struct LogStdBounds {
  double low, high, is_tanh;

  Vec log_std(const Vec& raw) const {
    if (is_tanh == 0.0) return at::vec::clamp(raw, Vec(float(low)), Vec(float(high)));
    return Vec(float(low)) + half_width() * (raw.tanh() + Vec(1.0f));
  }

  // By raw, from that by log_std
  Vec gradient(const Vec& raw, const Vec& by_log_std) const {
    if (is_tanh == 0.0) {
      return Vec::blendv(by_log_std, Vec(0.0f), (raw < Vec(float(low))) | (raw > Vec(float(high))));
    }
    const Vec squashed = raw.tanh();
    return by_log_std * half_width() * (Vec(1.0f) - squashed * squashed);
  }

 private:
  Vec half_width() const { return Vec(float(0.5 * (high - low))); }
};

// A parameter with Adam's state and its gradient, of which each member of a team has its own rows' part
struct Parameter {
  Tensor value, exp_avg, exp_avg_sq, step;  // targets have the value only
  int64_t n_elements;
  float *data, *m, *v;
  double steps;
  std::vector<Floats> gradients;

  explicit Parameter(const Tensor* tensors, bool is_trained = true) : value(tensors[0]), n_elements(value.numel()) {
    if (!is_trained) return;
    exp_avg = tensors[1], exp_avg_sq = tensors[2], step = tensors[3];
  }

  // Tensors may have been moved or changed since they were looked at last. Returns whether they are still plain
  bool find() {
    for (const Tensor& tensor : {value, exp_avg, exp_avg_sq, step}) {
      if (tensor.defined() && !is_plain(tensor, tensor.is_same(step) ? 1 : n_elements)) return false;
    }
    data = value.mutable_data_ptr<float>();
    if (!step.defined()) return true;
    m = exp_avg.mutable_data_ptr<float>();
    v = exp_avg_sq.mutable_data_ptr<float>();
    steps = *step.const_data_ptr<float>();
    return true;
  }

  void reserve(int64_t team_size) {
    gradients.resize(team_size);
    for (Floats& gradient : gradients) gradient.resize(n_elements);
  }

  Range elements_of(const Crew& crew) const {
    const Range vectors = crew.of((n_elements + LANES - 1) / LANES);
    return {vectors.begin * LANES, std::min(vectors.end * LANES, n_elements)};
  }

  // Makes the gradient of the members' parts; returns the sum of its squares
  double add_gradients(const Crew& crew) {
    float* total = gradients[0].data();
    Vec squares(0.0f);
    each_vector(elements_of(crew), [&](int64_t i, int64_t n) {
      Vec sum = Vec::loadu(total + i, n);
      for (int64_t part = 1; part < crew.size; part++) sum = sum + Vec::loadu(&gradients[part][i], n);
      if (crew.size > 1) sum.store(total + i, n);
      squares = at::vec::fmadd(sum, sum, squares);
    });
    return sum_of(squares);
  }

  // The step of torch.optim.Adam or AdamW, `n_before` steps after the last that was counted, with the gradient times a
  // factor
  void update(const Adam& adam, float factor, int64_t n_before, const Crew& crew) const {
    const double number = steps + n_before + 1;
    const double correction1 = 1.0 - std::pow(adam.beta1, number), correction2 = 1.0 - std::pow(adam.beta2, number);
    const Vec step_size(float(-adam.learning_rate / correction1)), per_root(float(1.0 / std::sqrt(correction2)));
    const Vec eps(float(adam.eps)), scale(factor);
    const Vec rate2(float(1.0 - adam.beta2)), kept2(float(adam.beta2));
    const bool decays = adam.weight_decay != 0.0, is_decoupled = adam.is_decoupled != 0.0;
    const Vec decay(float(adam.weight_decay)), kept(float(1.0 - adam.learning_rate * adam.weight_decay));
    const float* gradient = gradients[0].data();
    each_vector(elements_of(crew), [&](int64_t i, int64_t n) {
      Vec value = Vec::loadu(data + i, n), g = Vec::loadu(gradient + i, n) * scale;
      if (decays && is_decoupled) value = value * kept;
      if (decays && !is_decoupled) g = at::vec::fmadd(decay, value, g);
      const Vec first = lerp(Vec::loadu(m + i, n), g, float(1.0 - adam.beta1));
      const Vec second = at::vec::fmadd(rate2 * g, g, kept2 * Vec::loadu(v + i, n));
      first.store(m + i, n);
      second.store(v + i, n);
      (value + step_size * first / at::vec::fmadd(second.sqrt(), per_root, eps)).store(data + i, n);
    });
  }

  void count(int64_t n_steps) const { *step.mutable_data_ptr<float>() = float(steps + n_steps); }
};

// Sums over rows, for each of some columns, of value(row, column, number of columns)
template <typename F>
void sum_rows(Range rows, int64_t columns, float* sums, const F& value) {
  std::fill_n(sums, columns, 0.0f);
  int64_t row = rows.begin;
  for (; row + 4 <= rows.end; row += 4) {
    each_vector({0, columns}, [&](int64_t j, int64_t n) {
      const Vec four = value(row, j, n) + value(row + 1, j, n) + (value(row + 2, j, n) + value(row + 3, j, n));
      (Vec::loadu(sums + j, n) + four).store(sums + j, n);
    });
  }
  for (; row < rows.end; row++) {
    each_vector({0, columns}, [&](int64_t j, int64_t n) {
      (Vec::loadu(sums + j, n) + value(row, j, n)).store(sums + j, n);
    });
  }
}

// Scales a norm's parameters together, to the norm that they begin with
void project_to_unit_norm(std::initializer_list<const Parameter*> parameters) {
  double squares = 0.0;
  int64_t n = 0;
  for (const Parameter* parameter : parameters) {
    n = parameter->n_elements;
    for (int64_t i = 0; i < n; i++) squares += double(parameter->data[i]) * parameter->data[i];
  }
  const float factor = std::sqrt(n / (squares + 1e-16));
  for (const Parameter* parameter : parameters) {
    for (int64_t i = 0; i < n; i++) parameter->data[i] *= factor;
  }
}

// Batch norm of a matrix's columns (C), by the statistics of a batch or by the running ones
class BatchNorm {
 public:
  Parameter scale, shift;
  Floats factor, offset;  // by running statistics, x becomes factor x + offset

  BatchNorm(const Tensor* tensors, bool is_trained)
      : scale(tensors, is_trained),
        shift(tensors + (is_trained ? OF_PARAMETER : 1), is_trained),
        mean_(tensors[is_trained ? 2 * OF_PARAMETER : 2]),
        var_(tensors[is_trained ? 2 * OF_PARAMETER + 1 : 3]),
        n_(scale.n_elements) {}

  template <typename F>
  void each_parameter(const F& f) {
    f(scale);
    f(shift);
  }

  bool find() { return is_plain(mean_, n_) && is_plain(var_, n_); }

  void reserve(int64_t crew_size) {
    parts_.resize(crew_size);
    for (Part& part : parts_) {
      for (Floats* values : {&part.mean, &part.squares, &part.all_mean, &part.all_squares, &part.inverse_std}) {
        values->resize(n_);
      }
    }
  }

  // Statistics of the rows of all members
  void measure(const float* x, Range rows, float eps, const Crew& crew) {
    Part& own = parts_[crew.member];
    own.n_rows = rows.end - rows.begin;
    sum_rows(rows, n_, own.mean.data(), [&](int64_t row, int64_t j, int64_t n) { return Vec::loadu(x + row * n_ + j, n); });
    const float per_row = 1.0f / std::max<int64_t>(1, own.n_rows);
    for (float& value : own.mean) value *= per_row;
    sum_rows(rows, n_, own.squares.data(), [&](int64_t row, int64_t j, int64_t n) {
      const Vec difference = Vec::loadu(x + row * n_ + j, n) - Vec::loadu(&own.mean[j], n);
      return difference * difference;
    });
    crew.wait();
    own.all_rows = 0;
    std::fill_n(own.all_mean.begin(), n_, 0.0f);
    for (int64_t i = 0; i < crew.size; i++) own.all_rows += parts_[i].n_rows;
    for (int64_t i = 0; i < crew.size; i++) {
      const float weight = float(parts_[i].n_rows) / own.all_rows;
      for (int64_t j = 0; j < n_; j++) own.all_mean[j] += weight * parts_[i].mean[j];
    }
    std::fill_n(own.all_squares.begin(), n_, 0.0f);
    for (int64_t i = 0; i < crew.size; i++) {
      for (int64_t j = 0; j < n_; j++) {
        const float difference = parts_[i].mean[j] - own.all_mean[j];
        own.all_squares[j] += parts_[i].squares[j] + parts_[i].n_rows * difference * difference;
      }
    }
    for (int64_t j = 0; j < n_; j++) own.inverse_std[j] = 1.0f / std::sqrt(own.all_squares[j] / own.all_rows + eps);
  }

  // By what was measured last
  void normalize(const float* x, Range rows, bool relu, const Crew& crew, float* out) const {
    const Part& own = parts_[crew.member];
    const Vec zero(0.0f);
    for (int64_t row = rows.begin; row < rows.end; row++) {
      each_vector({0, n_}, [&](int64_t j, int64_t n) {
        const Vec factor = Vec::loadu(scale.data + j, n) * Vec::loadu(&own.inverse_std[j], n);
        const Vec centred = Vec::loadu(x + row * n_ + j, n) - Vec::loadu(&own.all_mean[j], n);
        const Vec made = at::vec::fmadd(centred, factor, Vec::loadu(shift.data + j, n));
        (relu ? at::vec::clamp_min(made, zero) : made).store(out + row * n_ + j, n);
      });
    }
  }

  // By the running statistics
  void normalize(const float* x, Range rows, float* out) const {
    for (int64_t row = rows.begin; row < rows.end; row++) {
      each_vector({0, n_}, [&](int64_t j, int64_t n) {
        at::vec::fmadd(Vec::loadu(x + row * n_ + j, n), Vec::loadu(&factor[j], n), Vec::loadu(&offset[j], n))
            .store(out + row * n_ + j, n);
      });
    }
  }

  // A member's part of the parameters' gradients, by that of what was made
  void differentiate(const float* x, const float* gradient, Range rows, const Crew& crew) {
    const Part& own = parts_[crew.member];
    float *of_scale = scale.gradients[crew.member].data(), *of_shift = shift.gradients[crew.member].data();
    sum_rows(rows, n_, of_shift, [&](int64_t row, int64_t j, int64_t n) { return Vec::loadu(gradient + row * n_ + j, n); });
    sum_rows(rows, n_, of_scale, [&](int64_t row, int64_t j, int64_t n) {
      return Vec::loadu(gradient + row * n_ + j, n) *
             (Vec::loadu(x + row * n_ + j, n) - Vec::loadu(&own.all_mean[j], n));
    });
    for (int64_t j = 0; j < n_; j++) of_scale[j] *= own.inverse_std[j];
  }

  // The same, and then the gradient of x in the place of that of what was made
  void backward(const float* x, float* gradient, Range rows, const Crew& crew) {
    differentiate(x, gradient, rows, crew);
    crew.wait();
    Part& own = parts_[crew.member];
    // No longer needed: means of the gradient, and of its product with the normalised x by the latter's scale
    float *mean_gradient = own.mean.data(), *mean_product = own.squares.data();
    for (int64_t j = 0; j < n_; j++) {
      float sum = 0.0f, product = 0.0f;
      for (int64_t i = 0; i < crew.size; i++) sum += shift.gradients[i][j], product += scale.gradients[i][j];
      mean_gradient[j] = sum / own.all_rows;
      mean_product[j] = product / own.all_rows * own.inverse_std[j];
    }
    for (int64_t row = rows.begin; row < rows.end; row++) {
      each_vector({0, n_}, [&](int64_t j, int64_t n) {
        const Vec centred = Vec::loadu(x + row * n_ + j, n) - Vec::loadu(&own.all_mean[j], n);
        const Vec factor = Vec::loadu(scale.data + j, n) * Vec::loadu(&own.inverse_std[j], n);
        const Vec rest = Vec::loadu(gradient + row * n_ + j, n) - Vec::loadu(mean_gradient + j, n) -
                         centred * Vec::loadu(mean_product + j, n);
        (factor * rest).store(gradient + row * n_ + j, n);
      });
    }
  }

  // Moves the running statistics to those that were measured last
  void track(float momentum) {
    const Part& last = parts_[0];
    float *mean = mean_.mutable_data_ptr<float>(), *var = var_.mutable_data_ptr<float>();
    for (int64_t j = 0; j < n_; j++) {
      mean[j] = momentum * last.all_mean[j] + (1.0f - momentum) * mean[j];
      var[j] = momentum * (last.all_squares[j] / (last.all_rows - 1)) + (1.0f - momentum) * var[j];
    }
  }

  void copy_statistics(const BatchNorm& other) {
    std::copy_n(other.mean_.const_data_ptr<float>(), n_, mean_.mutable_data_ptr<float>());
    std::copy_n(other.var_.const_data_ptr<float>(), n_, var_.mutable_data_ptr<float>());
  }

  // After each change of statistics or parameters
  void prepare(float eps) {
    factor.resize(n_);
    offset.resize(n_);
    const float *mean = mean_.const_data_ptr<float>(), *var = var_.const_data_ptr<float>();
    for (int64_t j = 0; j < n_; j++) {
      factor[j] = scale.data[j] / std::sqrt(var[j] + eps);
      offset[j] = shift.data[j] - mean[j] * factor[j];
    }
  }

 private:
  // What a member has measured of its rows (mean, and squares of differences from it), and knows of all rows
  struct Part {
    int64_t n_rows, all_rows;
    Floats mean, squares, all_mean, all_squares, inverse_std;
  };

  Tensor mean_, var_;  // running
  int64_t n_;
  std::vector<Part> parts_;
};

// Scales each row of a matrix (rows, C) to root mean square 1, and each column by a parameter
class RmsNorm {
 public:
  Parameter scale;

  RmsNorm(const Tensor* tensors, bool is_trained) : scale(tensors, is_trained) {}

  void forward(const float* x, Range rows, float* out) const {
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const Vec factor(inverse_size(x + row * n()));
      each_vector({0, n()}, [&](int64_t j, int64_t count) {
        (Vec::loadu(x + row * n() + j, count) * factor * Vec::loadu(scale.data + j, count)).store(out + row * n() + j, count);
      });
    }
  }

  // Puts the gradient of x in the place of that of what was made
  void backward(const float* x, float* gradient, Range rows) const {
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const float *values = x + row * n(), factor = inverse_size(values);
      float* at = gradient + row * n();
      Vec product(0.0f);
      each_vector({0, n()}, [&](int64_t j, int64_t count) {
        const Vec scaled = Vec::loadu(at + j, count) * Vec::loadu(scale.data + j, count);
        product = at::vec::fmadd(scaled, Vec::loadu(values + j, count), product);
      });
      const Vec inverse(factor), along(sum_of(product) / n() * factor * factor);
      each_vector({0, n()}, [&](int64_t j, int64_t count) {
        const Vec scaled = Vec::loadu(at + j, count) * Vec::loadu(scale.data + j, count);
        (inverse * (scaled - along * Vec::loadu(values + j, count))).store(at + j, count);
      });
    }
  }

  // A member's part of the parameter's gradient
  void differentiate(const float* x, const float* gradient, Range rows, int64_t member) {
    std::vector<float> factors(rows.end - rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row++) factors[row - rows.begin] = inverse_size(x + row * n());
    sum_rows(rows, n(), scale.gradients[member].data(), [&](int64_t row, int64_t j, int64_t count) {
      return Vec::loadu(gradient + row * n() + j, count) * Vec::loadu(x + row * n() + j, count) *
             Vec(factors[row - rows.begin]);
    });
  }

 private:
  static constexpr float EPS = 1e-6f;

  int64_t n() const { return scale.n_elements; }

  float inverse_size(const float* row) const {
    Vec squares(0.0f);
    each_vector({0, n()}, [&](int64_t j, int64_t count) {
      const Vec values = Vec::loadu(row + j, count);
      squares = at::vec::fmadd(values, values, squares);
    });
    return 1.0f / std::sqrt(sum_of(squares) / n() + EPS);
  }
};

enum Kind { LINEAR, RELU, ENDS_BLOCK };  // what is behind a layer: nothing, relu, or also a sum with the block's inputs

struct Layer {
  Kind kind;
  Parameter weight;               // (out, in)
  std::optional<Parameter> bias;  // (out)
  std::optional<BatchNorm> norm;  // of its outputs; then there is no bias
  std::optional<RmsNorm> rms;     // behind all else
  int64_t in, out;

  Layer(const Tensors& tensors, Kind kind, bool is_trained)
      : kind(kind), weight(tensors.data(), is_trained), in(weight.value.size(1)), out(weight.value.size(0)) {
    const size_t n = is_trained ? OF_PARAMETER : 1;
    if (tensors.size() > n) bias.emplace(tensors.data() + n, is_trained);
  }

  template <typename F>
  void each_parameter(const F& f) {
    f(weight);
    if (bias) f(*bias);
    if (norm) norm->each_parameter(f);
    if (rms) f(rms->scale);
  }

  // Its outputs are those of relu, and nothing is behind them
  bool is_plain_relu() const { return kind == RELU && !rms; }

  // Before batch norm
  void multiply(const float* inputs, Range rows, float* outputs) const {
    const Matrix a{inputs, rows.end, in, in, 1}, b{weight.data, in, out, 1, in};
    rows_of_product(a, b, {}, rows.begin, rows.end, outputs);
  }

  // With batch norm by its running statistics, and relu
  void forward(const float* inputs, Range rows, float* outputs) const {
    const float* scale = norm ? norm->factor.data() : nullptr;
    const float* shift = norm ? norm->offset.data() : bias ? bias->data : nullptr;
    const bool relu = kind != LINEAR;
    if (out > 1 && rows.end - rows.begin > FEW_ROWS) {
      const Matrix a{inputs, rows.end, in, in, 1}, b{weight.data, in, out, 1, in};
      rows_of_product(a, b, {.scale = scale, .bias = shift, .relu = relu}, rows.begin, rows.end, outputs);
      return;
    }
    for (int64_t i = rows.begin * out; i < rows.end * out; i++) {
      const float *row = inputs + i / out * in, *weights = weight.data + i % out * in;
      Vec sum(0.0f);
      each_vector({0, in}, [&](int64_t j, int64_t n) {
        sum = at::vec::fmadd(Vec::loadu(row + j, n), Vec::loadu(weights + j, n), sum);
      });
      const float made = (scale ? scale[i % out] * sum_of(sum) : sum_of(sum)) + (shift ? shift[i % out] : 0.0f);
      outputs[i] = relu && made <= 0.0f ? 0.0f : made;
    }
  }

  // Gradient of the inputs, or of those from one on, by that of the outputs
  void backward(const float* outputs, Range rows, const Epilogue& epilogue, float* inputs, int64_t first = 0) const {
    const Matrix a{outputs, rows.end, out, out, 1}, b{weight.data + first, out, in - first, in, 1};
    rows_of_product(a, b, epilogue, rows.begin, rows.end, inputs);
  }

  // Some rows' part of the parameters' gradients
  void differentiate(const float* inputs, const float* outputs, Range rows, int64_t member) {
    float* of_weight = weight.gradients[member].data();
    const int64_t n = rows.end - rows.begin;
    if (out > 1) {
      const Matrix a{outputs + rows.begin * out, out, n, 1, out}, b{inputs + rows.begin * in, n, in, in, 1};
      rows_of_product(a, b, {}, 0, out, of_weight);
    } else {
      column_sums(outputs, inputs, in, rows, of_weight);
    }
    if (bias) column_sums(nullptr, outputs, out, rows, bias->gradients[member].data());
  }

  // Scales some of the rows of the weights
  void project_to_unit_norm(Range rows) const {
    for (int64_t row = rows.begin; row < rows.end; row++) {
      float* weights = weight.data + row * in;
      Vec squares(0.0f);
      each_vector({0, in}, [&](int64_t j, int64_t n) {
        const Vec values = Vec::loadu(weights + j, n);
        squares = at::vec::fmadd(values, values, squares);
      });
      const Vec factor(1.0f / std::sqrt(sum_of(squares) + 1e-16f));
      each_vector({0, in}, [&](int64_t j, int64_t n) { (Vec::loadu(weights + j, n) * factor).store(weights + j, n); });
    }
  }
};

// What a network is made of: tensors of linear layers and of norms, in their order; and kinds of the linear layers
struct Parts {
  std::vector<Tensors> tensors;
  std::vector<int64_t> kinds;
};

struct Stack {
  std::optional<BatchNorm> input_norm;
  std::vector<Layer> layers;
  bool has_norms = false;

  Stack(const Parts& parts, bool is_trained) {
    for (const Tensors& tensors : parts.tensors) {
      has_norms = has_norms || tensors[0].dim() == 1;
      if (tensors[0].dim() == 2) {
        layers.emplace_back(tensors, Kind(parts.kinds[layers.size()]), is_trained);
      } else if (tensors.size() == (is_trained ? OF_PARAMETER : 1)) {
        layers.back().rms.emplace(tensors.data(), is_trained);
      } else if (layers.empty()) {
        input_norm.emplace(tensors.data(), is_trained);
      } else {
        layers.back().norm.emplace(tensors.data(), is_trained);
      }
    }
  }

  template <typename F>
  void each_norm(const F& f) {
    if (input_norm) f(*input_norm);
    for (Layer& layer : layers) {
      if (layer.norm) f(*layer.norm);
    }
  }

  template <typename F>
  void each_parameter(const F& f) {
    if (input_norm) input_norm->each_parameter(f);
    for (Layer& layer : layers) layer.each_parameter(f);
  }

  bool find() {
    bool found = true;
    each_parameter([&](Parameter& parameter) { found = parameter.find() && found; });
    each_norm([&](BatchNorm& norm) { found = norm.find() && found; });
    return found;
  }

  void reserve(int64_t crew_size, bool is_trained) {
    if (is_trained) each_parameter([&](Parameter& parameter) { parameter.reserve(crew_size); });
    each_norm([&](BatchNorm& norm) { norm.reserve(crew_size); });
  }

  // After each change of parameters or statistics
  void prepare(float eps) {
    each_norm([&](BatchNorm& norm) { norm.prepare(eps); });
  }
};

// How networks are normalised
struct Normalization {
  double eps, momentum, projects_weights, projects_norms;
};

// The layers of a network. Of each there is room for what it makes of a minibatch, (B, out). The gradient of that takes
// its place, which leaves more of a core's cache to the rest
struct Network {
  Stack own;

  explicit Network(Stack stack) : own(std::move(stack)) {}

  void reserve(int64_t batch_size) {
    const std::vector<Layer>& layers = own.layers;
    rooms_.resize(layers.size());
    if (own.input_norm) {
      for (Floats* values : {&inputs_made_, &inputs_gradient_}) reserve_values(*values, batch_size * layers[0].in);
    }
    for (size_t i = 0; i < layers.size(); i++) {
      const int64_t n = batch_size * layers[i].out;
      reserve_values(rooms_[i].made, n);
      if (layers[i].norm) reserve_values(rooms_[i].before_norm, n);
      if (layers[i].kind == ENDS_BLOCK) reserve_values(rooms_[i].sum, n);
      if (layers[i].rms) reserve_values(rooms_[i].behind_rms, n);
      if (i > 0 && layers[i].out > DEPTH) reserve_values(unmasked_, batch_size * layers[i].in);
    }
  }

  // By running statistics
  void forward(const Stack& stack, const float* inputs, Range rows) {
    if (stack.input_norm) {
      stack.input_norm->normalize(inputs, rows, inputs_made_.data());
      inputs = inputs_made_.data();
    }
    for (size_t i = 0; i < stack.layers.size(); i++) {
      stack.layers[i].forward(inputs, rows, rooms_[i].made.data());
      finish(stack.layers[i], i, rows);
      inputs = outputs(i);
    }
  }

  // By the statistics of all members' rows; a last layer that is linear makes some of them only
  void forward(Stack& stack, const float* inputs, Range rows, Range last_rows, float eps, const Crew& crew) {
    if (stack.input_norm) {
      stack.input_norm->measure(inputs, rows, eps, crew);
      stack.input_norm->normalize(inputs, rows, false, crew, inputs_made_.data());
      inputs = inputs_made_.data();
    }
    for (size_t i = 0; i < stack.layers.size(); i++) {
      Layer& layer = stack.layers[i];
      Room& room = rooms_[i];
      if (layer.norm) {
        layer.multiply(inputs, rows, room.before_norm.data());
        layer.norm->measure(room.before_norm.data(), rows, eps, crew);
        layer.norm->normalize(room.before_norm.data(), rows, true, crew, room.made.data());
      } else {
        layer.forward(inputs, made_by(i, rows, last_rows), room.made.data());
      }
      finish(layer, i, rows);
      inputs = outputs(i);
    }
  }

  // From the gradient of what the last layer made to that of the first before batch norm, by running statistics
  const float* backward(float* gradient, Range rows) {
    float* of_sum = nullptr;
    for (size_t i = own.layers.size(); i-- > 0;) {
      Layer& layer = own.layers[i];
      if (layer.rms) layer.rms->backward(before_rms(i), gradient, rows);
      if (layer.kind == ENDS_BLOCK) {
        of_sum = gradient;
        gradient = through_relu(i, gradient, rows, layer.norm ? layer.norm->factor.data() : nullptr);
      }
      if (i > 0) gradient = through(i, gradient, rows, of_sum, true);
    }
    return gradient;
  }

  // From that of what the last layer made, by the statistics of the batch, with a member's part of the parameters'
  // gradients. Behind a linear layer it is 0 but for some rows
  void backward(float* gradient, Range rows, Range last_rows, const float* inputs, const Crew& crew) {
    float* of_sum = nullptr;
    for (size_t i = own.layers.size(); i-- > 0;) {
      Layer& layer = own.layers[i];
      if (layer.rms) {
        layer.rms->differentiate(before_rms(i), gradient, rows, crew.member);
        layer.rms->backward(before_rms(i), gradient, rows);
      }
      if (layer.kind == ENDS_BLOCK) {
        of_sum = gradient;
        gradient = through_relu(i, gradient, rows, nullptr);
      }
      const Range made = made_by(i, rows, last_rows);
      if (layer.norm) layer.norm->backward(rooms_[i].before_norm.data(), gradient, rows, crew);
      const float* layer_inputs = i > 0 ? outputs(i - 1) : own.input_norm ? inputs_made_.data() : inputs;
      layer.differentiate(layer_inputs, gradient, made, crew.member);
      if (i == 0) break;
      gradient = through(i, gradient, made, of_sum, false);
      std::fill(gradient + rows.begin * layer.in, gradient + made.begin * layer.in, 0.0f);
      std::fill(gradient + made.end * layer.in, gradient + rows.end * layer.in, 0.0f);
    }
    if (own.input_norm) {
      own.layers[0].backward(gradient, rows, {}, inputs_gradient_.data());
      own.input_norm->differentiate(inputs, inputs_gradient_.data(), rows, crew);
    }
  }

  float* outputs() { return outputs(rooms_.size() - 1); }

  // Takes rows to the place of others
  void move_row(int64_t from, int64_t to) {
    if (from == to) return;
    for (size_t i = 0; i < rooms_.size(); i++) {
      for (Floats* values : {&rooms_[i].made, &rooms_[i].sum}) {
        const int64_t n = own.layers[i].out;
        if (!values->empty()) std::copy_n(&(*values)[from * n], n, &(*values)[to * n]);
      }
    }
  }

 private:
  // For what a layer makes: before batch norm, behind relu, with the block's inputs, behind the RMS norm
  struct Room {
    Floats before_norm, made, sum, behind_rms;
  };

  float* outputs(size_t i) { return own.layers[i].rms ? rooms_[i].behind_rms.data() : before_rms(i); }

  float* before_rms(size_t i) {
    return own.layers[i].kind == ENDS_BLOCK ? rooms_[i].sum.data() : rooms_[i].made.data();
  }

  Range made_by(size_t i, Range rows, Range last_rows) const {
    const bool is_last = i + 1 == own.layers.size() && own.layers[i].kind == LINEAR;
    return is_last ? last_rows : rows;
  }

  void finish(const Layer& layer, size_t i, Range rows) {
    if (layer.kind == ENDS_BLOCK) {
      const float *made = rooms_[i].made.data(), *inputs = outputs(i - 2);
      float* sum = rooms_[i].sum.data();
      each_vector({rows.begin * layer.out, rows.end * layer.out}, [&](int64_t j, int64_t n) {
        (Vec::loadu(inputs + j, n) + Vec::loadu(made + j, n)).store(sum + j, n);
      });
    }
    if (layer.rms) layer.rms->forward(before_rms(i), rows, rooms_[i].behind_rms.data());
  }

  // From the gradient of a block's sum to that of what its last layer made before relu, in the place of what it made
  float* through_relu(size_t i, const float* gradient, Range rows, const float* scale) {
    const int64_t out = own.layers[i].out;
    float* made = rooms_[i].made.data();
    for (int64_t row = rows.begin; row < rows.end; row++) {
      each_vector({0, out}, [&](int64_t j, int64_t n) {
        Vec value = Vec::loadu(gradient + row * out + j, n);
        if (scale) value = value * Vec::loadu(scale + j, n);
        float* at = made + row * out + j;
        Vec::blendv(value, Vec(0.0f), Vec::loadu(at, n) <= Vec(0.0f)).store(at, n);
      });
    }
    return made;
  }

  // Gradient of a layer's inputs, in their place; before relu, if that is what made them, and before batch norm by
  // running statistics. That of the inputs of a block is added to that of its sum
  float* through(size_t i, const float* gradient, Range rows, float* of_sum, bool by_running_statistics) {
    const Layer &layer = own.layers[i], &before = own.layers[i - 1];
    if (i + 1 < own.layers.size() && own.layers[i + 1].kind == ENDS_BLOCK) {
      layer.backward(gradient, rows, {.adds = true}, of_sum);
      return of_sum;
    }
    if (!before.is_plain_relu() && layer.out > 1) {
      layer.backward(gradient, rows, {}, outputs(i - 1));
      return outputs(i - 1);
    }
    const float* scale = by_running_statistics && before.norm ? before.norm->factor.data() : nullptr;
    float* hidden = outputs(i - 1);
    const bool is_product = layer.out > 1;
    if (is_product && layer.out <= DEPTH) {
      layer.backward(gradient, rows, {.scale = scale, .relu_of = hidden}, hidden);
      return hidden;
    }
    if (is_product) layer.backward(gradient, rows, {}, unmasked_.data());  // stored before it is complete
    const bool has_relu = before.is_plain_relu();
    for (int64_t row = rows.begin; row < rows.end; row++) {
      float* at = hidden + row * layer.in;
      const float* values = is_product ? &unmasked_[row * layer.in] : layer.weight.data;
      const Vec factor(is_product ? 1.0f : gradient[row]), zero(0.0f);
      each_vector({0, layer.in}, [&](int64_t j, int64_t n) {
        Vec value = factor * Vec::loadu(values + j, n);
        if (scale && has_relu) value = value * Vec::loadu(scale + j, n);
        if (has_relu) value = Vec::blendv(value, zero, Vec::loadu(at + j, n) <= zero);
        value.store(at + j, n);
      });
    }
    return hidden;
  }

  std::vector<Room> rooms_;
  Floats inputs_made_, inputs_gradient_;  // of the norm of the inputs
  Floats unmasked_;                       // takes products of layers that are too wide for their place
};

// Hidden layers, and behind them the layers of mean and log_std
struct GaussianActor : Network {
  Layer mu, log_std;
  Floats mean, raw_log_std;  // (B, A)

  // From the layers, with mu and log_std at the end
  explicit GaussianActor(const Parts& parts, bool is_trained = true)
      : Network(Stack({{parts.tensors.begin(), parts.tensors.end() - 2}, parts.kinds}, is_trained)),
        mu(parts.tensors[parts.tensors.size() - 2], LINEAR, is_trained),
        log_std(parts.tensors.back(), LINEAR, is_trained) {}

  template <typename F>
  void each_parameter(const F& f) {
    own.each_parameter(f);
    mu.each_parameter(f);
    log_std.each_parameter(f);
  }

  bool find() {
    bool found = own.find();
    for (Layer* layer : {&mu, &log_std}) {
      layer->each_parameter([&](Parameter& parameter) { found = parameter.find() && found; });
    }
    return found;
  }

  void reserve(int64_t batch_size) {
    Network::reserve(batch_size);
    for (Floats* values : {&mean, &raw_log_std}) reserve_values(*values, batch_size * mu.out);
  }

  // By running statistics
  void evaluate(const float* observations, Range rows) {
    forward(own, observations, rows);
    evaluate_outputs(rows);
  }

  // By those of all members' rows, of which some are wanted
  void evaluate(const float* observations, Range all_rows, Range rows, float eps, const Crew& crew) {
    forward(own, observations, all_rows, all_rows, eps, crew);
    evaluate_outputs(rows);
  }

  // Whether the mask of a relu is to be applied to the gradient of the outputs
  bool ends_with_relu() const { return own.layers.back().is_plain_relu(); }

 private:
  void evaluate_outputs(Range rows) {
    mu.forward(outputs(), rows, mean.data());
    log_std.forward(outputs(), rows, raw_log_std.data());
  }
};

// What a critic's K outputs mean, see heads.py: a value, or logits of a distribution over K atoms
struct Head {
  int64_t n;
  double v_min, v_max;
  Floats atoms;

  bool is_categorical() const { return n > 1; }

  void prepare() {
    atoms.resize(n);
    if (!is_categorical()) return;
    // As torch.linspace: from both ends
    const float step = (float(v_max) - float(v_min)) / (n - 1);
    for (int64_t k = 0; k < n; k++) {
      atoms[k] = k < n / 2 ? float(v_min) + step * k : float(v_max) - step * (n - 1 - k);
    }
  }

  float value(const float* outputs) const {
    if (!is_categorical()) return *outputs;
    float* p = buffer();
    softmax(outputs, p);
    return mean(p);
  }

  // Of logits; returns the logarithm of the sum of their exponentials
  float softmax(const float* logits, float* probabilities) const {
    const Vec lowest(-std::numeric_limits<float>::infinity());
    Vec highest = lowest, sums(0.0f);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      highest = at::vec::maximum(highest, Vec::set(lowest, Vec::loadu(logits + k, count), count));
    });
    const float shift =
        at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return at::vec::maximum(x, y); }, highest);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      const Vec values = (Vec::loadu(logits + k, count) - Vec(shift)).exp();
      values.store(probabilities + k, count);
      sums = sums + Vec::set(Vec(0.0f), values, count);
    });
    const float sum = sum_of(sums);
    const Vec scale(1.0f / sum);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      (Vec::loadu(probabilities + k, count) * scale).store(probabilities + k, count);
    });
    return shift + std::log(sum);
  }

  float mean(const float* probabilities) const {
    Vec sum(0.0f);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      sum = at::vec::fmadd(Vec::loadu(probabilities + k, count), Vec::loadu(&atoms[k], count), sum);
    });
    return sum_of(sum);
  }

  // Puts a factor times the gradient of the value in the place of the outputs
  void differentiate_value(float factor, float* outputs) const {
    if (!is_categorical()) {
      *outputs = factor;
      return;
    }
    float* p = buffer();
    softmax(outputs, p);
    const Vec centre(mean(p)), scale(factor);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      (scale * Vec::loadu(p + k, count) * (Vec::loadu(&atoms[k], count) - centre)).store(outputs + k, count);
    });
  }

  // Cross-entropy; puts a factor times its gradient in the place of the logits
  float differentiate_loss(const float* target, float factor, float* logits) const {
    float* p = buffer();
    const Vec log_sum(softmax(logits, p)), scale(factor);
    Vec loss(0.0f), mass(0.0f);
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      const Vec share = Vec::loadu(target + k, count);
      loss = at::vec::fmadd(share, log_sum - Vec::loadu(logits + k, count), loss);
      mass = mass + share;
    });
    const Vec total(sum_of(mass));
    each_vector({0, n}, [&](int64_t k, int64_t count) {
      (scale * (Vec::loadu(p + k, count) * total - Vec::loadu(target + k, count))).store(logits + k, count);
    });
    return sum_of(loss);
  }

  struct Target {
    float value, clipped_mass;
  };

  // Projection on the atoms of a distribution whose atoms are moved to start + discount * (atom - entropy)
  Target project(const float* logits, float start, float discount, float entropy, float* target) const {
    float* p = buffer();
    softmax(logits, p);
    std::fill_n(target, n, 0.0f);
    const float low = v_min, high = v_max, per_distance = float((n - 1) / (v_max - v_min));
    Target sums{0.0f, 0.0f};
    for (int64_t k = 0; k < n; k++) {
      const float moved = start + discount * (atoms[k] - entropy);
      sums.value += p[k] * moved;
      if (moved < low || moved > high) sums.clipped_mass += p[k];
      const float position = (std::min(std::max(moved, low), high) - low) * per_distance;
      if (std::isnan(position + p[k])) {  // then the update is not done
        std::fill_n(target, n, std::numeric_limits<float>::quiet_NaN());
        return sums;
      }
      const int64_t below = std::min<int64_t>(position, n - 2);
      target[below] += p[k] * std::max(0.0f, 1.0f - std::abs(position - below));
      target[below + 1] += p[k] * std::max(0.0f, 1.0f - std::abs(position - (below + 1)));
    }
    return sums;
  }

 private:
  float* buffer() const {
    static thread_local Floats values;
    reserve_values(values, n);
    return values.data();
  }
};

struct Critic : Network {
  Stack target;
  Floats values, next_outputs;                   // (B), (B, K); the latter are the target's
  std::vector<int64_t> rows;                     // of the minibatch, in which the value is the least of all critics'
  Floats gradient_of_actions, gradient_in_rows;  // (B, A), and in those rows

  Critic(const Parts& parts, const Parts& target_parts) : Network(Stack(parts, true)), target(target_parts, false) {}

  float* output(int64_t row) { return outputs() + row * own.layers.back().out; }
};

// What an update is told besides tensors
struct Options {
  double gamma, tau, target_entropy, log_action_scale, max_grad_norm, ent_coef_loss_is_exp, saturated;
  double joint_batch;  // 0: none, 1: of the critics, 2: of the actor, too
  double has_critic_target, v_min, v_max;
  LogStdBounds log_std_bounds;
  Normalization normalization;
  Adam critic, ent_coef, actor;

  // Each number by the name that it has in update.py
  std::vector<std::pair<std::string, double*>> named() {
    std::vector<std::pair<std::string, double*>> all = {
        {"gamma", &gamma},
        {"tau", &tau},
        {"target_entropy", &target_entropy},
        {"log_action_scale", &log_action_scale},
        {"max_grad_norm", &max_grad_norm},
        {"ent_coef_loss_is_exp", &ent_coef_loss_is_exp},
        {"saturated", &saturated},
        {"joint_batch", &joint_batch},
        {"has_critic_target", &has_critic_target},
        {"v_min", &v_min},
        {"v_max", &v_max},
        {"log_std_low", &log_std_bounds.low},
        {"log_std_high", &log_std_bounds.high},
        {"log_std_is_tanh", &log_std_bounds.is_tanh},
        {"batch_norm_eps", &normalization.eps},
        {"batch_norm_momentum", &normalization.momentum},
        {"projects_weights", &normalization.projects_weights},
        {"projects_norms", &normalization.projects_norms},
    };
    for (auto [name, adam] : {std::pair{"critic_", &critic}, {"ent_coef_", &ent_coef}, {"actor_", &actor}}) {
      const std::string of = name;
      all.insert(all.end(), {{of + "learning_rate", &adam->learning_rate},
                             {of + "beta1", &adam->beta1},
                             {of + "beta2", &adam->beta2},
                             {of + "eps", &adam->eps},
                             {of + "weight_decay", &adam->weight_decay},
                             {of + "decoupled_weight_decay", &adam->is_decoupled}});
    }
    return all;
  }
};

// Of a thread's rows or parameters
struct alignas(64) Sums {
  double critic_loss, q_value, target_q, clipped, squares, log_prob, min_q, log_std, saturated;
};

// How far updates have come; each thread knows for itself
struct Progress {
  bool finite;
  int64_t n_critic_steps, n_ent_coef_steps, n_actor_steps;
};

// A minibatch, of several that lie one behind the other
struct Batch {
  int64_t size;
  const float *observations, *actions, *next_observations, *dones, *rewards, *discounts;

  Batch following(int64_t n, int64_t n_observations, int64_t n_actions) const {
    const int64_t rows = n * size;
    return {size,
            observations + rows * n_observations,
            actions + rows * n_actions,
            next_observations + rows * n_observations,
            dones + rows,
            rewards + rows,
            discounts ? discounts + rows : nullptr};
  }
};

// Columns of an update's metrics, under their log keys: those of each update, of each with the actor's, of each with a
// learned entropy coefficient's, and of each with categorical critics
#define CRITIC_METRICS(X) X(critic_loss) X(q_value) X(target_q_value) X(critic_grad_norm) X(ent_coef) X(finite)
#define ACTOR_METRICS(X) X(actor_loss) X(entropy) X(log_std) X(saturated_actions) X(actor_grad_norm)
#define ENT_COEF_METRICS(X) X(ent_coef_loss)
#define CATEGORICAL_METRICS(X) X(clipped_target_mass)
namespace metric {
#define COLUMN(name) name,
enum { CRITIC_METRICS(COLUMN) ACTOR_METRICS(COLUMN) ENT_COEF_METRICS(COLUMN) CATEGORICAL_METRICS(COLUMN) N };
}  // namespace metric

class Update : public torch::CustomClassHolder {
 public:
  // Networks come as Parts. Trained parameters have exp_avg, exp_avg_sq and step with them; the actor's last layers are
  // mu and log_std, which have no kind. An entropy coefficient that is learned is its logarithm
  Update(std::vector<Tensors> actor, std::vector<int64_t> actor_kinds, std::vector<std::vector<Tensors>> critics,
         std::vector<std::vector<Tensors>> targets, std::vector<int64_t> critic_kinds, Tensors ent_coef)
      : actor_({actor, actor_kinds}),
        ent_coef_(ent_coef.data(), ent_coef.size() > 1),
        learns_ent_coef_(ent_coef.size() > 1),
        n_actions_(actor_.mu.out) {
    for (auto [name, number] : options_.named()) numbers_.push_back(number);
    for (size_t i = 0; i < critics.size(); i++) critics_.emplace_back(Parts{critics[i], critic_kinds}, Parts{targets[i], critic_kinds});
    head_.n = critics_[0].own.layers.back().out;
  }

  // Names of the options of run(), in their order
  std::vector<std::string> option_names() {
    std::vector<std::string> names;
    for (auto [name, number] : options_.named()) names.push_back(name);
    return names;
  }

  // Names of the columns of the metrics
  std::vector<std::vector<std::string>> metric_names() {
#define NAME(name) #name,
    return {{CRITIC_METRICS(NAME)}, {ACTOR_METRICS(NAME)}, {ENT_COEF_METRICS(NAME)}, {CATEGORICAL_METRICS(NAME)}};
  }

  // Does updates, each with its own minibatch: the batch is observations, actions, next observations, dones, rewards
  // and maybe discounts of all. Each has a number of updates of the actor, and moves the targets (1) or not (0). Returns
  // their metrics, or nothing if tensors are not plain or do not fit: then nothing has been drawn or changed
  std::optional<Tensor> run(Tensors batch, std::vector<int64_t> actor_updates, std::vector<int64_t> with_targets,
                            std::vector<double> options, bool finite) {
    TORCH_CHECK(options.size() == numbers_.size(), options.size(), " options");
    for (size_t i = 0; i < options.size(); i++) *numbers_[i] = options[i];
    const int64_t n_observations = n_inputs() - n_actions_;
    const int64_t widths[] = {n_observations, n_actions_, n_observations, 1, 1, 1};
    const int64_t n_updates = actor_updates.size(), n_rows = batch[3].numel(), size = n_rows / n_updates;
    const float* data[6] = {};
    for (size_t i = 0; i < batch.size(); i++) {
      if (!is_plain(batch[i], size * n_updates * widths[i])) return std::nullopt;
      data[i] = batch[i].const_data_ptr<float>();
    }
    if (!find_tensors()) return std::nullopt;
    const Batch first{size, data[0], data[1], data[2], data[3], data[4], data[5]};
    reserve(size);
    prepare();
    Tensor metrics = at::empty({n_updates, metric::N}, batch[0].options());
    float* of_update = metrics.mutable_data_ptr<float>();
    const int64_t n_draws = std::accumulate(actor_updates.begin(), actor_updates.end(), n_updates);
    const Tensor drawn = at::empty({n_draws, size, n_actions_}, batch[0].options());
    for (int64_t i = 0; i < n_draws; i++) drawn.select(0, i).normal_();
    const float* noise = drawn.const_data_ptr<float>();
    Progress done;
#pragma omp parallel num_threads(at::get_num_threads()) firstprivate(noise, of_update)
    {
      const Team team(omp_get_thread_num(), omp_get_num_threads(), critics_.size());
#pragma omp single
      reserve_for(team);  // there may be fewer threads than were asked for
      Progress progress{finite, 0, 0, 0};
      for (int64_t i = 0; i < n_updates; i++, of_update += metric::N) {
        const Batch minibatch = first.following(i, n_observations, n_actions_);
        // In the order of gradient_step.draw_noise
        const auto draw = [&] { return std::exchange(noise, noise + size * n_actions_); };
        const float* noise_of_pi = actor_updates[i] > 0 ? draw() : nullptr;
        critic_update(team, minibatch, draw(), progress, of_update);
        for (int64_t k = 0; k < actor_updates[i]; k++) {
          actor_update(team, minibatch, k == 0 ? noise_of_pi : draw(), progress, of_update);
        }
        if (with_targets[i] && progress.finite) update_targets(team);
        if (team.all.member == 0) of_update[metric::finite] = progress.finite;
      }
      if (team.all.member == 0) done = progress;
    }
    for (Critic& critic : critics_) {
      critic.own.each_parameter([&](Parameter& parameter) { parameter.count(done.n_critic_steps); });
    }
    actor_.each_parameter([&](Parameter& parameter) { parameter.count(done.n_actor_steps); });
    if (learns_ent_coef_) ent_coef_.count(done.n_ent_coef_steps);
    return metrics;
  }

 private:
  int64_t n_inputs() const { return critics_[0].own.layers[0].in; }

  float eps() const { return options_.normalization.eps; }

  bool has_joint_batch() const { return options_.joint_batch >= 1.0; }
  bool actor_has_joint_batch() const { return options_.joint_batch >= 2.0; }

  template <typename F>
  void each_critic(const Team& team, const F& f) {
    for (size_t i = team.first_critic; i < critics_.size(); i += team.n_teams) f(critics_[i]);
  }

  void prepare() {
    head_.v_min = options_.v_min, head_.v_max = options_.v_max;
    head_.prepare();
    actor_.own.prepare(eps());
    for (Critic& critic : critics_) {
      critic.own.prepare(eps());
      critic.target.prepare(eps());
    }
  }

  bool find_tensors() {
    bool found = ent_coef_.find();
    found = actor_.find() && found;
    for (Critic& critic : critics_) {
      found = critic.own.find() && found;
      found = critic.target.find() && found;
    }
    return found;
  }

  void reserve_for(const Team& team) {
    actor_.own.reserve(team.all.size, true);
    for (Layer* layer : {&actor_.mu, &actor_.log_std}) {
      layer->each_parameter([&](Parameter& parameter) { parameter.reserve(team.all.size); });
    }
    for (Critic& critic : critics_) {
      critic.own.reserve(team.mates.size, true);
      critic.target.reserve(team.mates.size, false);
    }
    ent_coef_.reserve(1);
    sums_.resize(team.all.size);
  }

  void reserve(int64_t n) {
    const int64_t n_values = n * n_actions_, n_joint = has_joint_batch() ? 2 * n : n;
    const int64_t n_of_actor = actor_has_joint_batch() ? 2 * n : n;
    actor_.reserve(n_of_actor);
    if (actor_has_joint_batch()) joint_observations_.resize(n_of_actor * (n_inputs() - n_actions_));
    inputs_.resize(n_joint * n_inputs());
    pi_inputs_.resize(n * n_inputs());
    for (Floats* values : {&log_std_values_, &std_, &pi_actions_, &densities_, &mean_delta_, &log_std_delta_}) {
      values->resize(n_values);
    }
    log_prob_.resize(n);
    target_.resize(n * head_.n);
    hidden_delta_.resize(n_of_actor * actor_.mu.in);
    for (Critic& critic : critics_) {
      critic.reserve(n_joint);
      critic.values.resize(n);
      critic.next_outputs.resize(n * head_.n);
      critic.rows.resize(n);
      critic.gradient_of_actions.resize(n_values);
      critic.gradient_in_rows.resize(n_values);
    }
  }

  void critic_update(const Team& team, const Batch& batch, const float* noise, Progress& progress, float* metrics) {
    const int64_t size = batch.size, n_critics = critics_.size();
    const bool is_joint = has_joint_batch();
    const Range all_rows = team.mates.of(is_joint ? 2 * size : size);  // of what a critic reads, and which of these are
    const Range rows = intersection(all_rows, {0, size}), next_rows = intersection(all_rows, {size, 2 * size});
    float* next_inputs = is_joint ? &inputs_[size * n_inputs()] : pi_inputs_.data();
    team.all.wait();  // others may be adding up the sums of the update before, or writing the actor
    Sums& sums = sums_[team.all.member] = {};
    const float ent_coef = coefficient();

    actor_.evaluate(batch.next_observations, team.all.of(size));
    sample(batch.next_observations, noise, team.all.of(size), next_inputs);
    join(batch.observations, batch.actions, inputs_.data(), team.all.of(size));
    team.all.wait();
    each_critic(team, [&](Critic& critic) {
      const auto keep = [&](Range of, int64_t first) {
        const float* outputs = critic.outputs();
        std::copy(outputs + of.begin * head_.n, outputs + of.end * head_.n,
                  &critic.next_outputs[(of.begin - first) * head_.n]);
      };
      const bool has_target = options_.has_critic_target != 0.0;
      if (!is_joint) {
        critic.forward(has_target ? critic.target : critic.own, next_inputs, rows);
        keep(rows, 0);
      } else if (has_target) {
        critic.forward(critic.target, inputs_.data(), all_rows, next_rows, eps(), team.mates);
        keep(next_rows, size);
      }
      const bool makes_next = is_joint && !has_target;
      critic.forward(critic.own, inputs_.data(), all_rows, makes_next ? all_rows : rows, eps(), team.mates);
      if (makes_next) keep(next_rows, size);
    });
    team.all.wait();
    if (head_.is_categorical()) {
      make_target(team.all.of(size), batch, ent_coef, sums);
      team.all.wait();
    }
    each_critic(team, [&](Critic& critic) {
      for (int64_t i = rows.begin; i < rows.end; i++) {
        float* outputs = critic.output(i);
        sums.q_value += head_.value(outputs);
        if (head_.is_categorical()) {
          sums.critic_loss += head_.differentiate_loss(&target_[i * head_.n], 1.0f / (size * n_critics), outputs);
          continue;
        }
        const float target_q = batch.rewards[i] + (1.0f - batch.dones[i]) * discount(batch, i) *
                                                      (least_next_value(i) - entropy_cost(ent_coef, i));
        const float error = *outputs - target_q;
        *outputs = error / size;
        sums.critic_loss += 0.5 * error * error;
        sums.target_q += target_q / n_critics;
      }
      critic.backward(critic.outputs(), all_rows, rows, inputs_.data(), team.mates);
    });
    team.mates.wait();
    each_critic(team, [&](Critic& critic) {
      critic.own.each_parameter([&](Parameter& parameter) { sums.squares += parameter.add_gradients(team.mates); });
    });
    team.all.wait();
    const Sums all = total(team);
    const double norm = std::sqrt(all.squares);
    const double loss = all.critic_loss / (head_.is_categorical() ? size * n_critics : size);
    progress.finite = progress.finite && std::isfinite(float(loss) + float(norm));
    if (progress.finite) {
      each_critic(team, [&](Critic& critic) {
        critic.own.each_parameter([&](Parameter& parameter) {
          parameter.update(options_.critic, factor(norm), progress.n_critic_steps, team.mates);
        });
        settle(critic.own, {}, team.mates);
      });
      progress.n_critic_steps++;
    }
    if (team.all.member == 0) {
      metrics[metric::critic_loss] = loss;
      metrics[metric::q_value] = all.q_value / (size * n_critics);
      metrics[metric::target_q_value] = all.target_q / size;
      metrics[metric::critic_grad_norm] = norm;
      metrics[metric::ent_coef] = ent_coef;
      metrics[metric::clipped_target_mass] = all.clipped / size;
    }
  }

  // Distributions of the soft Bellman target, for some rows
  void make_target(Range rows, const Batch& batch, float ent_coef, Sums& sums) {
    for (int64_t i = rows.begin; i < rows.end; i++) {
      const float* lowest = nullptr;
      float lowest_value = 0.0f;
      for (const Critic& critic : critics_) {
        const float* outputs = &critic.next_outputs[i * head_.n];
        const float value = head_.value(outputs);
        if (!lowest || value < lowest_value || std::isnan(value)) lowest = outputs, lowest_value = value;
      }
      const float discounted = (1.0f - batch.dones[i]) * discount(batch, i);
      const Head::Target target =
          head_.project(lowest, batch.rewards[i], discounted, entropy_cost(ent_coef, i), &target_[i * head_.n]);
      sums.target_q += target.value;
      sums.clipped += target.clipped_mass;
    }
  }

  float discount(const Batch& batch, int64_t row) const {
    return batch.discounts ? batch.discounts[row] : float(options_.gamma);
  }

  float entropy_cost(float ent_coef, int64_t row) const {
    return ent_coef * (log_prob_[row] - float(options_.log_action_scale));
  }

  // After a step: unit norms, statistics, and what is made of both. Others may go on when all have come here
  void settle(Stack& stack, std::initializer_list<Layer*> more_layers, const Crew& crew) {
    const Normalization& how = options_.normalization;
    if (!stack.has_norms && how.projects_weights == 0.0) return;
    crew.wait();
    if (how.projects_weights != 0.0) {
      for (Layer& layer : stack.layers) layer.project_to_unit_norm(crew.of(layer.out));
      for (Layer* layer : more_layers) layer->project_to_unit_norm(crew.of(layer->out));
    }
    if (crew.member == 0) {
      for (Layer& layer : stack.layers) {
        if (layer.rms && how.projects_norms != 0.0) project_to_unit_norm({&layer.rms->scale});
      }
      stack.each_norm([&](BatchNorm& norm) {
        if (how.projects_norms != 0.0) project_to_unit_norm({&norm.scale, &norm.shift});
        norm.track(how.momentum);
        norm.prepare(eps());
      });
    }
    crew.wait();
  }

  void actor_update(const Team& team, const Batch& batch, const float* noise, Progress& progress, float* metrics) {
    const bool is_joint = actor_has_joint_batch();
    const Range all_rows = team.all.of(is_joint ? 2 * batch.size : batch.size);  // of what the actor reads
    const Range rows = intersection(all_rows, {0, batch.size}), of_critic = team.mates.of(batch.size);
    const float* observations = is_joint ? joint_observations_.data() : batch.observations;
    team.all.wait();  // others may be adding up the sums of the update before, or writing the actor
    Sums& sums = sums_[team.all.member] = {};
    const float log_ent_coef = *ent_coef_.data, ent_coef = coefficient(), n = batch.size;
    const LogStdBounds bounds = options_.log_std_bounds;

    if (is_joint) {
      const int64_t n_observations = n_inputs() - n_actions_;
      for (int64_t row = all_rows.begin; row < all_rows.end; row++) {
        const float* half = row < batch.size ? batch.observations : batch.next_observations;
        std::copy_n(half + row % batch.size * n_observations, n_observations, &joint_observations_[row * n_observations]);
      }
    }
    actor_.evaluate(observations, all_rows, rows, eps(), team.all);
    sample(batch.observations, noise, rows, pi_inputs_.data());
    team.all.wait();
    each_critic(team, [&](Critic& critic) {
      critic.forward(critic.own, pi_inputs_.data(), of_critic);
      for (int64_t i = of_critic.begin; i < of_critic.end; i++) critic.values[i] = head_.value(critic.output(i));
    });
    team.all.wait();
    each_critic(team, [&](Critic& critic) { differentiate_actions(critic, of_critic, batch.size); });
    team.all.wait();
    // The density's part: d log_prob / du = 2 tanh(u), d log_prob / d log_std = -1, where u = mean + std noise
    for (int64_t i = rows.begin * n_actions_; i < rows.end * n_actions_; i++) {
      const float action = pi_actions_[i];
      float delta = 2.0f * ent_coef / n * action;
      for (const Critic& critic : critics_) delta += critic.gradient_of_actions[i] * (1.0f - action * action);
      mean_delta_[i] = delta;
      log_std_delta_[i] = delta * std_[i] * noise[i] - ent_coef / n;
      sums.log_std += log_std_values_[i];
      sums.saturated += std::abs(action) > float(options_.saturated);
    }
    each_vector({rows.begin * n_actions_, rows.end * n_actions_}, [&](int64_t i, int64_t n) {
      const Vec raw = Vec::loadu(&actor_.raw_log_std[i], n), delta = Vec::loadu(&log_std_delta_[i], n);
      bounds.gradient(raw, delta).store(&log_std_delta_[i], n);
    });
    for (int64_t i = rows.begin; i < rows.end; i++) {
      sums.log_prob += log_prob_[i] - float(options_.log_action_scale);
      sums.min_q += least_value(i);
    }
    const float* hidden = actor_.outputs();
    float* hidden_delta = hidden_delta_.data();
    actor_.mu.differentiate(hidden, mean_delta_.data(), rows, team.all.member);
    actor_.log_std.differentiate(hidden, log_std_delta_.data(), rows, team.all.member);
    actor_.mu.backward(mean_delta_.data(), rows, {}, hidden_delta);
    const float* relu_of = actor_.ends_with_relu() ? hidden : nullptr;
    actor_.log_std.backward(log_std_delta_.data(), rows, {.relu_of = relu_of, .adds = true}, hidden_delta);
    std::fill(hidden_delta + rows.end * actor_.mu.in, hidden_delta + all_rows.end * actor_.mu.in, 0.0f);
    actor_.backward(hidden_delta, all_rows, all_rows, observations, team.all);
    team.all.wait();
    actor_.each_parameter([&](Parameter& parameter) { sums.squares += parameter.add_gradients(team.all); });
    team.all.wait();
    const Sums all = total(team);
    const double log_prob = all.log_prob / n, norm = std::sqrt(all.squares);
    const double loss = ent_coef * log_prob - all.min_q / n, distance = log_prob + options_.target_entropy;
    if (learns_ent_coef_) {
      const bool is_exp = options_.ent_coef_loss_is_exp != 0.0;
      const double ent_coef_loss = -(is_exp ? ent_coef : log_ent_coef) * distance;
      progress.finite = progress.finite && std::isfinite(float(ent_coef_loss));
      if (progress.finite) {
        if (team.all.member == 0) {
          ent_coef_.gradients[0][0] = -(is_exp ? ent_coef : 1.0) * distance;
          ent_coef_.update(options_.ent_coef, 1.0f, progress.n_ent_coef_steps, {0, 1});
        }
        progress.n_ent_coef_steps++;
      }
      if (team.all.member == 0) metrics[metric::ent_coef_loss] = ent_coef_loss;
    }
    progress.finite = progress.finite && std::isfinite(float(loss) + float(norm));
    if (progress.finite) {
      actor_.each_parameter([&](Parameter& parameter) {
        parameter.update(options_.actor, factor(norm), progress.n_actor_steps, team.all);
      });
      settle(actor_.own, {&actor_.mu, &actor_.log_std}, team.all);
      progress.n_actor_steps++;
    }
    if (team.all.member == 0) {
      metrics[metric::actor_loss] = loss;
      metrics[metric::entropy] = -log_prob;
      metrics[metric::log_std] = all.log_std / (n * n_actions_);
      metrics[metric::saturated_actions] = all.saturated / (n * n_actions_);
      metrics[metric::actor_grad_norm] = norm;
    }
  }

  void update_targets(const Team& team) {
    const auto move = [&](Parameter& target, const Parameter& parameter) {
      each_vector(parameter.elements_of(team.mates), [&](int64_t i, int64_t n) {
        const Vec old = Vec::loadu(target.data + i, n), value = Vec::loadu(parameter.data + i, n);
        lerp(old, value, float(options_.tau)).store(target.data + i, n);
      });
    };
    const auto move_norm = [&](BatchNorm& target, const BatchNorm& norm) {
      if (team.mates.member != 0) return;
      const Crew alone{0, 1};
      for (auto [to, from] : {std::pair{&target.scale, &norm.scale}, {&target.shift, &norm.shift}}) {
        each_vector(from->elements_of(alone), [&](int64_t i, int64_t n) {
          lerp(Vec::loadu(to->data + i, n), Vec::loadu(from->data + i, n), float(options_.tau)).store(to->data + i, n);
        });
      }
      target.copy_statistics(norm);
      target.prepare(eps());
    };
    each_critic(team, [&](Critic& critic) {
      if (critic.own.input_norm) move_norm(*critic.target.input_norm, *critic.own.input_norm);
      for (size_t i = 0; i < critic.own.layers.size(); i++) {
        Layer &target = critic.target.layers[i], &layer = critic.own.layers[i];
        move(target.weight, layer.weight);
        if (layer.bias) move(*target.bias, *layer.bias);
        if (layer.norm) move_norm(*target.norm, *layer.norm);
        if (layer.rms) move(target.rms->scale, layer.rms->scale);
      }
    });
  }

  float coefficient() const { return learns_ent_coef_ ? std::exp(*ent_coef_.data) : *ent_coef_.data; }

  float factor(double norm) const {
    const double limit = options_.max_grad_norm;
    return std::isfinite(limit) ? std::min(limit / (norm + 1e-6), 1.0) : 1.0;
  }

  // Actions with log-densities by what the actor has made of some observations; both together are inputs of critics
  void sample(const float* observations, const float* noise, Range rows, float* inputs) {
    const LogStdBounds bounds = options_.log_std_bounds;
    const Vec half(0.5f), two(2.0f);
    each_vector({rows.begin * n_actions_, rows.end * n_actions_}, [&](int64_t i, int64_t n) {
      const Vec log_std = bounds.log_std(Vec::loadu(&actor_.raw_log_std[i], n)), std = log_std.exp();
      const Vec sample = Vec::loadu(noise + i, n), u = Vec::loadu(&actor_.mean[i], n) + std * sample, x = u * Vec(-2.0f);
      const Vec softplus = Vec::blendv(x.exp().log1p(), x, x > Vec(20.0f));
      const Vec log_det = two * (Vec(LOG_2) - u - softplus);
      const Vec density = half * sample * sample + log_std + Vec(HALF_LOG_2PI) + log_det;
      log_std.store(&log_std_values_[i], n);
      std.store(&std_[i], n);
      u.tanh().store(&pi_actions_[i], n);
      density.neg().store(&densities_[i], n);
    });
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const float* first = &densities_[row * n_actions_];
      log_prob_[row] = std::accumulate(first, first + n_actions_, 0.0f);
    }
    join(observations, pi_actions_.data(), inputs, rows);
  }

  void join(const float* observations, const float* actions, float* inputs, Range rows) const {
    const int64_t n_observations = n_inputs() - n_actions_;
    for (int64_t row = rows.begin; row < rows.end; row++) {
      std::copy_n(observations + row * n_observations, n_observations, inputs + row * n_inputs());
      std::copy_n(actions + row * n_actions_, n_actions_, inputs + row * n_inputs() + n_observations);
    }
  }

  // The least of the values that are not NaN, or else NaN
  template <typename F>
  float least(const F& value_of) const {
    float least = std::numeric_limits<float>::infinity();
    for (const Critic& critic : critics_) {
      const float value = value_of(critic);
      if (value < least || std::isnan(value)) least = value;
    }
    return least;
  }

  float least_value(int64_t row) const {
    return least([&](const Critic& critic) { return critic.values[row]; });
  }

  float least_next_value(int64_t row) const {
    return least([&](const Critic& critic) { return critic.next_outputs[row]; });
  }

  // Gradient of the actor's loss through a critic, for some rows of B. There is none where another critic's value is
  // the least: those rows are left out
  void differentiate_actions(Critic& critic, Range rows, int64_t batch_size) {
    Range used{rows.begin, rows.begin};
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const float min_value = least_value(row);
      if (critic.values[row] > min_value) continue;
      int64_t n_least = 0;  // they share it
      for (const Critic& other : critics_) n_least += !(other.values[row] > min_value);
      critic.rows[used.end] = row;
      critic.move_row(row, used.end);
      head_.differentiate_value(-1.0f / (batch_size * n_least), critic.output(used.end++));
    }
    const float* of_first = critic.backward(critic.outputs(), used);
    const Layer& first = critic.own.layers[0];
    const int64_t n_observations = first.in - n_actions_;
    const float* scale = critic.own.input_norm ? &critic.own.input_norm->factor[n_observations] : nullptr;
    first.backward(of_first, used, {.scale = scale}, critic.gradient_in_rows.data(), n_observations);
    float* gradient = critic.gradient_of_actions.data();
    std::fill(gradient + rows.begin * n_actions_, gradient + rows.end * n_actions_, 0.0f);
    for (int64_t k = used.begin; k < used.end; k++) {
      std::copy_n(&critic.gradient_in_rows[k * n_actions_], n_actions_, gradient + critic.rows[k] * n_actions_);
    }
  }

  Sums total(const Team& team) const {
    Sums all{};
    for (int64_t i = 0; i < team.all.size; i++) {
      const Sums& one = sums_[i];
      all.critic_loss += one.critic_loss, all.q_value += one.q_value, all.target_q += one.target_q;
      all.clipped += one.clipped;
      all.squares += one.squares, all.log_prob += one.log_prob, all.min_q += one.min_q;
      all.log_std += one.log_std, all.saturated += one.saturated;
    }
    return all;
  }

  GaussianActor actor_;
  std::vector<Critic> critics_;
  Head head_;
  Parameter ent_coef_;
  bool learns_ent_coef_;
  int64_t n_actions_;

  Options options_;
  std::vector<double*> numbers_;  // of the options
  std::vector<Sums> sums_;
  Floats inputs_, pi_inputs_;  // of critics, (B, O + A); the former may be joint, (2 B, O + A)
  Floats target_;              // of categorical critics, (B, K)
  Floats joint_observations_;  // (2 B, O)
  Floats log_std_values_, std_, pi_actions_, densities_, mean_delta_, log_std_delta_;  // (B, A)
  Floats log_prob_;      // (B)
  Floats hidden_delta_;  // gradient of what the actor's last hidden layer made
};

// Explores: samples actions as torch's actor does. It has memory of its own, so that the few rows of environments stay near
class Actor : public torch::CustomClassHolder {
 public:
  Actor(std::vector<Tensors> layers, std::vector<int64_t> kinds) : actor_({layers, kinds}, false) {}

  // Scaled actions for observations of E environments (E, ...), (E, A). It draws as torch's randn_like does. Nothing if
  // tensors are not plain or do not fit: then nothing has been drawn
  std::optional<Tensor> sample(Tensor observations, double low, double high, double is_tanh, double eps) {
    if (observations.dim() < 2) return std::nullopt;
    const int64_t n = observations.size(0), n_values = n * actor_.mu.out;
    const Tensor inputs = observations.to(at::kFloat).contiguous();
    if (!is_plain(inputs, n * actor_.own.layers[0].in) || !actor_.find()) return std::nullopt;
    actor_.reserve(n);
    actor_.own.prepare(eps);
    actor_.evaluate(inputs.const_data_ptr<float>(), {0, n});
    Tensor actions = at::randn({n, actor_.mu.out}, inputs.options());
    float* values = actions.mutable_data_ptr<float>();  // the noise, until each is replaced
    const LogStdBounds bounds{low, high, is_tanh};
    each_vector({0, n_values}, [&](int64_t i, int64_t n) {
      const Vec std = bounds.log_std(Vec::loadu(&actor_.raw_log_std[i], n)).exp();
      (Vec::loadu(&actor_.mean[i], n) + std * Vec::loadu(values + i, n)).tanh().store(values + i, n);
    });
    return actions;
  }

 private:
  GaussianActor actor_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(sb3_softsac, m) {
  m.class_<Actor>("Actor")
      .def(torch::init<std::vector<Tensors>, std::vector<int64_t>>())
      .def("sample", &Actor::sample);
  m.class_<Update>("Update")
      .def(torch::init<std::vector<Tensors>, std::vector<int64_t>, std::vector<std::vector<Tensors>>,
                       std::vector<std::vector<Tensors>>, std::vector<int64_t>, Tensors>())
      .def("option_names", &Update::option_names)
      .def("metric_names", &Update::metric_names)
      .def("run", &Update::run);
}
