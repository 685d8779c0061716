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

constexpr int64_t OF_PARAMETER = 4, OF_LAYER = 2 * OF_PARAMETER;  // tensors that come with each, if it is trained
constexpr float LOG_2 = 0.693147180559945f, HALF_LOG_2PI = 0.918938533204673f;
constexpr int64_t FEW_ROWS = 3;      // for which the weights are not packed: that would take longer

struct Range {
  int64_t begin, end;
};

Range share(int64_t n, int64_t member, int64_t size) { return {n * member / size, n * (member + 1) / size}; }

// Threads that do the same critics' work
struct Team {
  int64_t thread, n_threads, first_critic, n_teams, member, size;

  Team(int64_t thread, int64_t n_threads, int64_t n_critics)
      : thread(thread),
        n_threads(n_threads),
        first_critic(thread % std::gcd(n_threads, n_critics)),
        n_teams(std::gcd(n_threads, n_critics)),
        member(thread / n_teams),
        size(n_threads / n_teams) {}

  Range of_critic(int64_t n) const { return share(n, member, size); }
  Range of_all(int64_t n) const { return share(n, thread, n_threads); }
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

  Range elements_of(int64_t member, int64_t size) const {
    const Range vectors = share((n_elements + LANES - 1) / LANES, member, size);
    return {vectors.begin * LANES, std::min(vectors.end * LANES, n_elements)};
  }

  // Makes the gradient of the members' parts; returns the sum of its squares
  double add_gradients(int64_t member, int64_t size) {
    float* total = gradients[0].data();
    Vec squares(0.0f);
    each_vector(elements_of(member, size), [&](int64_t i, int64_t n) {
      Vec sum = Vec::loadu(total + i, n);
      for (int64_t part = 1; part < size; part++) sum = sum + Vec::loadu(&gradients[part][i], n);
      if (size > 1) sum.store(total + i, n);
      squares = at::vec::fmadd(sum, sum, squares);
    });
    return sum_of(squares);
  }

  // The step of torch.optim.Adam or AdamW, `n_before` steps after the last that was counted, with the gradient times a
  // factor
  void update(const Adam& adam, float factor, int64_t n_before, int64_t member, int64_t size) const {
    const double number = steps + n_before + 1;
    const double correction1 = 1.0 - std::pow(adam.beta1, number), correction2 = 1.0 - std::pow(adam.beta2, number);
    const Vec step_size(float(-adam.learning_rate / correction1)), per_root(float(1.0 / std::sqrt(correction2)));
    const Vec eps(float(adam.eps)), scale(factor);
    const Vec rate2(float(1.0 - adam.beta2)), kept2(float(adam.beta2));
    const bool decays = adam.weight_decay != 0.0, is_decoupled = adam.is_decoupled != 0.0;
    const Vec decay(float(adam.weight_decay)), kept(float(1.0 - adam.learning_rate * adam.weight_decay));
    const float* gradient = gradients[0].data();
    each_vector(elements_of(member, size), [&](int64_t i, int64_t n) {
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

struct Layer {
  Parameter weight, bias;  // (out, in), (out)
  int64_t in, out;

  explicit Layer(const Tensor* tensors, bool is_trained = true)
      : weight(tensors, is_trained),
        bias(tensors + (is_trained ? OF_PARAMETER : 1), is_trained),
        in(weight.value.size(1)),
        out(weight.value.size(0)) {}

  template <typename F>
  void each_parameter(const F& f) {
    f(weight);
    f(bias);
  }

  void forward(const float* inputs, bool relu, Range rows, float* outputs) const {
    if (out > 1 && rows.end - rows.begin > FEW_ROWS) {
      const Matrix a{inputs, rows.end, in, in, 1}, b{weight.data, in, out, 1, in};
      rows_of_product(a, b, {.bias = bias.data, .relu = relu}, rows.begin, rows.end, outputs);
      return;
    }
    for (int64_t i = rows.begin * out; i < rows.end * out; i++) {
      const float *row = inputs + i / out * in, *weights = weight.data + i % out * in;
      Vec sum(0.0f);
      each_vector({0, in}, [&](int64_t j, int64_t n) {
        sum = at::vec::fmadd(Vec::loadu(row + j, n), Vec::loadu(weights + j, n), sum);
      });
      const float made = sum_of(sum) + bias.data[i % out];
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
    float *of_weight = weight.gradients[member].data(), *of_bias = bias.gradients[member].data();
    const int64_t n = rows.end - rows.begin;
    if (out > 1) {
      const Matrix a{outputs + rows.begin * out, out, n, 1, out}, b{inputs + rows.begin * in, n, in, in, 1};
      rows_of_product(a, b, {}, 0, out, of_weight);
    } else {
      column_sums(outputs, inputs, in, rows, of_weight);
    }
    column_sums(nullptr, outputs, out, rows, of_bias);
  }
};

// Layers with relu between them, and behind the last if that is a hidden one. Of each there is room for what it makes
// of a minibatch, (B, out). The gradient of that takes its place, which leaves more of a core's cache to the rest
struct Network {
  std::vector<Layer> layers;
  std::vector<Floats> made;
  Floats unmasked;  // takes products of layers that are too wide for that

  void reserve(int64_t batch_size) {
    made.resize(layers.size());
    for (size_t i = 0; i < layers.size(); i++) {
      reserve_values(made[i], batch_size * layers[i].out);
      if (i > 0 && layers[i].out > DEPTH) reserve_values(unmasked, batch_size * layers[i].in);
    }
  }

  void forward(const std::vector<Layer>& with_layers, const float* inputs, Range rows, bool ends_hidden = false) {
    for (size_t i = 0; i < layers.size(); i++) {
      with_layers[i].forward(inputs, ends_hidden || i + 1 < layers.size(), rows, made[i].data());
      inputs = made[i].data();
    }
  }

  // From the gradient of what the last layer made to that of the first, with those of a member's part of the parameters
  // if inputs are given
  void backward(const float* outputs, Range rows, const float* inputs = nullptr, int64_t member = 0) {
    for (size_t i = layers.size(); i-- > 0;) {
      Layer& layer = layers[i];
      if (inputs) layer.differentiate(i > 0 ? made[i - 1].data() : inputs, outputs, rows, member);
      if (i == 0) break;
      float* hidden = made[i - 1].data();
      const bool is_product = layer.out > 1;
      if (is_product && layer.out <= DEPTH) {
        layer.backward(outputs, rows, {.relu_of = hidden}, hidden);
      } else {
        if (is_product) layer.backward(outputs, rows, {}, unmasked.data());  // stored before it is complete
        for (int64_t row = rows.begin; row < rows.end; row++) {
          float* at = hidden + row * layer.in;
          const float* values = is_product ? &unmasked[row * layer.in] : layer.weight.data;
          const Vec factor(is_product ? 1.0f : outputs[row]);
          each_vector({0, layer.in}, [&](int64_t j, int64_t n) {
            const Vec gradient = factor * Vec::loadu(values + j, n);
            Vec::blendv(gradient, Vec(0.0f), Vec::loadu(at + j, n) <= Vec(0.0f)).store(at + j, n);
          });
        }
      }
      outputs = hidden;
    }
  }
};

// Hidden layers, and behind them the layers of mean and log_std
struct GaussianActor : Network {
  Layer mu, log_std;
  Floats mean, raw_log_std;  // (B, A)

  // From the parameters of all layers, mu and log_std at the end
  explicit GaussianActor(const Tensors& parameters, bool is_trained = true)
      : mu(at(parameters, 2, is_trained), is_trained), log_std(at(parameters, 1, is_trained), is_trained) {
    for (const Tensor* layer = parameters.data(); layer < at(parameters, 2, is_trained); layer += stride(is_trained)) {
      layers.emplace_back(layer, is_trained);
    }
  }

  template <typename F>
  void each_parameter(const F& f) {
    for (Layer& layer : layers) layer.each_parameter(f);
    mu.each_parameter(f);
    log_std.each_parameter(f);
  }

  void reserve(int64_t batch_size) {
    Network::reserve(batch_size);
    for (Floats* values : {&mean, &raw_log_std}) reserve_values(*values, batch_size * mu.out);
  }

  const float* hidden() const { return made.back().data(); }

  void evaluate(const float* observations, Range rows) {
    forward(layers, observations, rows, true);
    mu.forward(hidden(), false, rows, mean.data());
    log_std.forward(hidden(), false, rows, raw_log_std.data());
  }

 private:
  static int64_t stride(bool is_trained) { return is_trained ? OF_LAYER : 2; }

  static const Tensor* at(const Tensors& parameters, int64_t from_end, bool is_trained) {
    return parameters.data() + parameters.size() - from_end * stride(is_trained);
  }
};

struct Critic : Network {
  std::vector<Layer> target;
  Floats q, next_q;                              // next_q is the target's, (B)
  std::vector<int64_t> rows;                     // of the minibatch, in which q is the least of all critics'
  Floats gradient_of_actions, gradient_in_rows;  // (B, A), and in those rows

  void evaluate(const std::vector<Layer>& with_layers, const float* inputs, Range rows, Floats& values) {
    forward(with_layers, inputs, rows);
    std::copy_n(made.back().data() + rows.begin, rows.end - rows.begin, values.data() + rows.begin);
  }
};

// What an update is told besides tensors
struct Options {
  double gamma, tau, target_entropy, log_action_scale, max_grad_norm, ent_coef_loss_is_exp, saturated;
  LogStdBounds log_std_bounds;
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
        {"log_std_low", &log_std_bounds.low},
        {"log_std_high", &log_std_bounds.high},
        {"log_std_is_tanh", &log_std_bounds.is_tanh},
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
  double critic_loss, q_value, target_q, squares, log_prob, min_q, log_std, saturated;
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

// Columns of an update's metrics, under their log keys: those of each update, of each with the actor's, and of each with a
// learned entropy coefficient's
#define CRITIC_METRICS(X) X(critic_loss) X(q_value) X(target_q_value) X(critic_grad_norm) X(ent_coef) X(finite)
#define ACTOR_METRICS(X) X(actor_loss) X(entropy) X(log_std) X(saturated_actions) X(actor_grad_norm)
#define ENT_COEF_METRICS(X) X(ent_coef_loss)
namespace metric {
#define COLUMN(name) name,
enum { CRITIC_METRICS(COLUMN) ACTOR_METRICS(COLUMN) ENT_COEF_METRICS(COLUMN) N };
}  // namespace metric

class Update : public torch::CustomClassHolder {
 public:
  // Trained parameters come with exp_avg, exp_avg_sq and step; the actor's last ones are those of mu and log_std. An
  // entropy coefficient that is learned is its logarithm
  Update(Tensors actor, std::vector<Tensors> critics, std::vector<Tensors> targets, Tensors ent_coef)
      : actor_(actor),
        ent_coef_(ent_coef.data(), ent_coef.size() > 1),
        learns_ent_coef_(ent_coef.size() > 1),
        n_actions_(actor_.mu.out) {
    for (auto [name, number] : options_.named()) numbers_.push_back(number);
    critics_.resize(critics.size());
    for (size_t i = 0; i < critics.size(); i++) {
      for (size_t k = 0; k < critics[i].size(); k += OF_LAYER) critics_[i].layers.emplace_back(&critics[i][k]);
      for (size_t k = 0; k < targets[i].size(); k += 2) critics_[i].target.emplace_back(&targets[i][k], false);
    }
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
    return {{CRITIC_METRICS(NAME)}, {ACTOR_METRICS(NAME)}, {ENT_COEF_METRICS(NAME)}};
  }

  // Does updates, each with its own minibatch: the batch is observations, actions, next observations, dones, rewards
  // and maybe discounts of all. Each has a number of updates of the actor, and moves the targets (1) or not (0). Returns
  // their metrics, or nothing if tensors are not plain or do not fit: then nothing has been drawn or changed
  std::optional<Tensor> run(Tensors batch, std::vector<int64_t> actor_updates, std::vector<int64_t> with_targets,
                            std::vector<double> options, bool finite) {
    TORCH_CHECK(options.size() == numbers_.size(), options.size(), " options");
    for (size_t i = 0; i < options.size(); i++) *numbers_[i] = options[i];
    const int64_t n_observations = critics_[0].layers[0].in - n_actions_;
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
        if (team.thread == 0) of_update[metric::finite] = progress.finite;
      }
      if (team.thread == 0) done = progress;
    }
    for (Critic& critic : critics_) {
      each_parameter(critic.layers, [&](Parameter& parameter) { parameter.count(done.n_critic_steps); });
    }
    actor_.each_parameter([&](Parameter& parameter) { parameter.count(done.n_actor_steps); });
    if (learns_ent_coef_) ent_coef_.count(done.n_ent_coef_steps);
    return metrics;
  }

 private:
  template <typename F>
  static void each_parameter(std::vector<Layer>& layers, const F& f) {
    for (Layer& layer : layers) layer.each_parameter(f);
  }

  template <typename F>
  void each_critic(const Team& team, const F& f) {
    for (size_t i = team.first_critic; i < critics_.size(); i += team.n_teams) f(critics_[i]);
  }

  bool find_tensors() {
    bool found = ent_coef_.find();
    const auto find = [&](Parameter& parameter) { found = parameter.find() && found; };
    actor_.each_parameter(find);
    for (Critic& critic : critics_) {
      each_parameter(critic.layers, find);
      each_parameter(critic.target, find);
    }
    return found;
  }

  void reserve_for(const Team& team) {
    actor_.each_parameter([&](Parameter& parameter) { parameter.reserve(team.n_threads); });
    for (Critic& critic : critics_) {
      each_parameter(critic.layers, [&](Parameter& parameter) { parameter.reserve(team.size); });
    }
    ent_coef_.reserve(1);
    sums_.resize(team.n_threads);
  }

  void reserve(int64_t n) {
    const int64_t n_values = n * n_actions_, n_inputs = critics_[0].layers[0].in;
    actor_.reserve(n);
    for (Floats* values : {&inputs_, &pi_inputs_}) values->resize(n * n_inputs);
    for (Floats* values : {&log_std_values_, &std_, &pi_actions_, &densities_, &mean_delta_, &log_std_delta_}) {
      values->resize(n_values);
    }
    log_prob_.resize(n);
    hidden_delta_.resize(n * actor_.mu.in);
    for (Critic& critic : critics_) {
      critic.reserve(n);
      critic.q.resize(n);
      critic.next_q.resize(n);
      critic.rows.resize(n);
      critic.gradient_of_actions.resize(n_values);
      critic.gradient_in_rows.resize(n_values);
    }
  }

  void critic_update(const Team& team, const Batch& batch, const float* noise, Progress& progress, float* metrics) {
    const Range rows = team.of_all(batch.size), of_critic = team.of_critic(batch.size);
#pragma omp barrier  // others may be adding up the sums of the update before, or writing the actor
    Sums& sums = sums_[team.thread] = {};
    const float ent_coef = coefficient(), log_action_scale = options_.log_action_scale;

    sample(batch.next_observations, noise, rows);
    join(batch.observations, batch.actions, inputs_.data(), rows);
#pragma omp barrier
    each_critic(team, [&](Critic& critic) {
      critic.evaluate(critic.target, pi_inputs_.data(), of_critic, critic.next_q);
      critic.evaluate(critic.layers, inputs_.data(), of_critic, critic.q);
    });
#pragma omp barrier
    each_critic(team, [&](Critic& critic) {
      for (int64_t i = of_critic.begin; i < of_critic.end; i++) {
        const float discount = batch.discounts ? batch.discounts[i] : float(options_.gamma);
        const float next_value = least(i, &Critic::next_q) - ent_coef * (log_prob_[i] - log_action_scale);
        const float target_q = batch.rewards[i] + (1.0f - batch.dones[i]) * discount * next_value;
        const float error = critic.q[i] - target_q;
        critic.made.back()[i] = error / batch.size;
        sums.critic_loss += 0.5 * error * error;
        sums.q_value += critic.q[i];
        sums.target_q += target_q;
      }
      critic.backward(critic.made.back().data(), of_critic, inputs_.data(), team.member);
    });
    if (team.size > 1) {
#pragma omp barrier
    }
    each_critic(team, [&](Critic& critic) {
      each_parameter(critic.layers, [&](Parameter& parameter) {
        sums.squares += parameter.add_gradients(team.member, team.size);
      });
    });
#pragma omp barrier
    const Sums all = total(team);
    const double norm = std::sqrt(all.squares), loss = all.critic_loss / batch.size;
    progress.finite = progress.finite && std::isfinite(float(loss) + float(norm));
    if (progress.finite) {
      each_critic(team, [&](Critic& critic) {
        each_parameter(critic.layers, [&](Parameter& parameter) {
          parameter.update(options_.critic, factor(norm), progress.n_critic_steps, team.member, team.size);
        });
      });
      progress.n_critic_steps++;
    }
    if (team.thread == 0) {
      metrics[metric::critic_loss] = loss;
      metrics[metric::q_value] = all.q_value / (batch.size * critics_.size());
      metrics[metric::target_q_value] = all.target_q / (batch.size * critics_.size());
      metrics[metric::critic_grad_norm] = norm;
      metrics[metric::ent_coef] = ent_coef;
    }
  }

  void actor_update(const Team& team, const Batch& batch, const float* noise, Progress& progress, float* metrics) {
    const Range rows = team.of_all(batch.size), of_critic = team.of_critic(batch.size);
#pragma omp barrier  // others may be adding up the sums of the update before, or writing the actor
    Sums& sums = sums_[team.thread] = {};
    const float log_ent_coef = *ent_coef_.data, ent_coef = coefficient(), n = batch.size;
    const LogStdBounds bounds = options_.log_std_bounds;

    sample(batch.observations, noise, rows);
#pragma omp barrier
    each_critic(team, [&](Critic& critic) {
      critic.evaluate(critic.layers, pi_inputs_.data(), of_critic, critic.q);
    });
#pragma omp barrier
    each_critic(team, [&](Critic& critic) { differentiate_actions(critic, of_critic, batch.size); });
#pragma omp barrier
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
      sums.min_q += least(i, &Critic::q);
    }
    const float* hidden = actor_.hidden();
    actor_.mu.differentiate(hidden, mean_delta_.data(), rows, team.thread);
    actor_.log_std.differentiate(hidden, log_std_delta_.data(), rows, team.thread);
    actor_.mu.backward(mean_delta_.data(), rows, {}, hidden_delta_.data());
    actor_.log_std.backward(log_std_delta_.data(), rows, {.relu_of = hidden, .adds = true}, hidden_delta_.data());
    actor_.backward(hidden_delta_.data(), rows, batch.observations, team.thread);
#pragma omp barrier
    actor_.each_parameter([&](Parameter& parameter) {
      sums.squares += parameter.add_gradients(team.thread, team.n_threads);
    });
#pragma omp barrier
    const Sums all = total(team);
    const double log_prob = all.log_prob / n, norm = std::sqrt(all.squares);
    const double loss = ent_coef * log_prob - all.min_q / n, distance = log_prob + options_.target_entropy;
    if (learns_ent_coef_) {
      const bool is_exp = options_.ent_coef_loss_is_exp != 0.0;
      const double ent_coef_loss = -(is_exp ? ent_coef : log_ent_coef) * distance;
      progress.finite = progress.finite && std::isfinite(float(ent_coef_loss));
      if (progress.finite) {
        if (team.thread == 0) {
          ent_coef_.gradients[0][0] = -(is_exp ? ent_coef : 1.0) * distance;
          ent_coef_.update(options_.ent_coef, 1.0f, progress.n_ent_coef_steps, 0, 1);
        }
        progress.n_ent_coef_steps++;
      }
      if (team.thread == 0) metrics[metric::ent_coef_loss] = ent_coef_loss;
    }
    progress.finite = progress.finite && std::isfinite(float(loss) + float(norm));
    if (progress.finite) {
      actor_.each_parameter([&](Parameter& parameter) {
        parameter.update(options_.actor, factor(norm), progress.n_actor_steps, team.thread, team.n_threads);
      });
      progress.n_actor_steps++;
    }
    if (team.thread == 0) {
      metrics[metric::actor_loss] = loss;
      metrics[metric::entropy] = -log_prob;
      metrics[metric::log_std] = all.log_std / (n * n_actions_);
      metrics[metric::saturated_actions] = all.saturated / (n * n_actions_);
      metrics[metric::actor_grad_norm] = norm;
    }
  }

  void update_targets(const Team& team) {
    const auto move = [&](Parameter& target, const Parameter& parameter) {
      each_vector(parameter.elements_of(team.member, team.size), [&](int64_t i, int64_t n) {
        const Vec old = Vec::loadu(target.data + i, n), value = Vec::loadu(parameter.data + i, n);
        lerp(old, value, float(options_.tau)).store(target.data + i, n);
      });
    };
    each_critic(team, [&](Critic& critic) {
      for (size_t i = 0; i < critic.layers.size(); i++) {
        move(critic.target[i].weight, critic.layers[i].weight);
        move(critic.target[i].bias, critic.layers[i].bias);
      }
    });
  }

  float coefficient() const { return learns_ent_coef_ ? std::exp(*ent_coef_.data) : *ent_coef_.data; }

  float factor(double norm) const {
    const double limit = options_.max_grad_norm;
    return std::isfinite(limit) ? std::min(limit / (norm + 1e-6), 1.0) : 1.0;
  }

  // The actor's actions for some observations, with log-densities; both together are inputs of critics
  void sample(const float* observations, const float* noise, Range rows) {
    actor_.evaluate(observations, rows);
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
    join(observations, pi_actions_.data(), pi_inputs_.data(), rows);
  }

  void join(const float* observations, const float* actions, float* inputs, Range rows) const {
    const int64_t n_inputs = critics_[0].layers[0].in, n_observations = n_inputs - n_actions_;
    for (int64_t row = rows.begin; row < rows.end; row++) {
      std::copy_n(observations + row * n_observations, n_observations, inputs + row * n_inputs);
      std::copy_n(actions + row * n_actions_, n_actions_, inputs + row * n_inputs + n_observations);
    }
  }

  float least(int64_t row, Floats Critic::*q_values) const {
    float least = std::numeric_limits<float>::infinity();
    for (const Critic& critic : critics_) {
      const float q = (critic.*q_values)[row];
      if (q < least || std::isnan(q)) least = q;
    }
    return least;
  }

  // Gradient of the actor's loss through a critic, for some rows of B. There is none where another critic's Q-value is
  // the least: those rows are left out
  void differentiate_actions(Critic& critic, Range rows, int64_t batch_size) {
    Range own{rows.begin, rows.begin};
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const float min_q = least(row, &Critic::q);
      if (critic.q[row] > min_q) continue;
      int64_t n_least = 0;  // they share it
      for (const Critic& other : critics_) n_least += !(other.q[row] > min_q);
      critic.made.back()[own.end] = -1.0f / (batch_size * n_least);
      critic.rows[own.end++] = row;
    }
    for (size_t i = 0; i + 1 < critic.layers.size(); i++) {
      const int64_t width = critic.layers[i].out;
      for (int64_t k = own.begin; k < own.end; k++) {
        const float* row = &critic.made[i][critic.rows[k] * width];
        if (critic.rows[k] != k) std::copy_n(row, width, &critic.made[i][k * width]);
      }
    }
    critic.backward(critic.made.back().data(), own);
    const Layer& first = critic.layers[0];
    first.backward(critic.made[0].data(), own, {}, critic.gradient_in_rows.data(), first.in - n_actions_);
    float* gradient = critic.gradient_of_actions.data();
    std::fill(gradient + rows.begin * n_actions_, gradient + rows.end * n_actions_, 0.0f);
    for (int64_t k = own.begin; k < own.end; k++) {
      std::copy_n(&critic.gradient_in_rows[k * n_actions_], n_actions_, gradient + critic.rows[k] * n_actions_);
    }
  }

  Sums total(const Team& team) const {
    Sums all{};
    for (int64_t i = 0; i < team.n_threads; i++) {
      const Sums& one = sums_[i];
      all.critic_loss += one.critic_loss, all.q_value += one.q_value, all.target_q += one.target_q;
      all.squares += one.squares, all.log_prob += one.log_prob, all.min_q += one.min_q;
      all.log_std += one.log_std, all.saturated += one.saturated;
    }
    return all;
  }

  GaussianActor actor_;
  std::vector<Critic> critics_;
  Parameter ent_coef_;
  bool learns_ent_coef_;
  int64_t n_actions_;

  Options options_;
  std::vector<double*> numbers_;  // of the options
  std::vector<Sums> sums_;
  Floats inputs_, pi_inputs_;  // of critics, (B, O + A)
  Floats log_std_values_, std_, pi_actions_, densities_, mean_delta_, log_std_delta_;  // (B, A)
  Floats log_prob_;      // (B)
  Floats hidden_delta_;  // gradient of what the actor's last hidden layer made
};

// Explores: samples actions as torch's actor does. It has memory of its own, so that the few rows of environments stay near
class Actor : public torch::CustomClassHolder {
 public:
  explicit Actor(Tensors parameters) : actor_(parameters, false) {}

  // Scaled actions for observations of E environments (E, ...), (E, A). It draws as torch's randn_like does. Nothing if
  // tensors are not plain or do not fit: then nothing has been drawn
  std::optional<Tensor> sample(Tensor observations, double low, double high, double is_tanh) {
    if (observations.dim() < 2) return std::nullopt;
    const int64_t n = observations.size(0), n_values = n * actor_.mu.out;
    const Tensor inputs = observations.to(at::kFloat).contiguous();
    bool found = is_plain(inputs, n * actor_.layers[0].in);
    actor_.each_parameter([&](Parameter& parameter) { found = parameter.find() && found; });
    if (!found) return std::nullopt;
    actor_.reserve(n);
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
      .def(torch::init<Tensors>())
      .def("sample", &Actor::sample);
  m.class_<Update>("Update")
      .def(torch::init<Tensors, std::vector<Tensors>, std::vector<Tensors>, Tensors>())
      .def("option_names", &Update::option_names)
      .def("metric_names", &Update::metric_names)
      .def("run", &Update::run);
}
