// Networks of an update, forward and backward, and the steps of their optimisers, see update.py. Compiled behind matmul.h.
//
// Threads share the rows of a minibatch, or the elements of a parameter, as crews.

#include <omp.h>

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

  // For all threads, not only those of this crew: each has a crew of this size, and comes here as often
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

// Sums over rows, for each of some columns, of value(row, column, number of columns). Faster than column_sums for many
// columns: it goes through memory row by row
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
    sum_rows(rows, n_, own.mean.data(),
             [&](int64_t row, int64_t j, int64_t n) { return Vec::loadu(x + row * n_ + j, n); });
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
    sum_rows(rows, n_, of_shift,
             [&](int64_t row, int64_t j, int64_t n) { return Vec::loadu(gradient + row * n_ + j, n); });
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
  // What a member has measured of its rows: mean, and squares of differences from it; and what it has made of that for
  // all rows. The latter is equal for all members: sharing it would take another barrier
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
        (Vec::loadu(x + row * n() + j, count) * factor * Vec::loadu(scale.data + j, count))
            .store(out + row * n() + j, count);
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
  // gradients. If the last layer is linear, only last_rows have a gradient
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
  Tensor given_atoms;  // (K), undefined for values
  double v_min, v_max;
  const float* atoms;

  bool is_categorical() const { return n > 1; }

  bool find() {
    if (!is_categorical()) return true;
    if (!is_plain(given_atoms, n)) return false;
    atoms = given_atoms.const_data_ptr<float>();
    return true;
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
      sum = at::vec::fmadd(Vec::loadu(probabilities + k, count), Vec::loadu(atoms + k, count), sum);
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
      (scale * Vec::loadu(p + k, count) * (Vec::loadu(atoms + k, count) - centre)).store(outputs + k, count);
    });
  }

  struct Loss {
    float loss, value;
  };

  // Cross-entropy, and the value; puts a factor times the loss's gradient in the place of the logits
  Loss differentiate_loss(const float* target, float factor, float* logits) const {
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
    return {sum_of(loss), mean(p)};
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
      const int64_t below = std::clamp<float>(position, 0.0f, n - 2);
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

}  // namespace
