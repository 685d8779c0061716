// Updates on the CPU, and actions of an actor, see update.py. It is compiled behind matmul.h and networks.h.
//
// All threads go through the updates together, and synchronise only on data dependences. Otherwise, cross-core traffic
// dominates: reading what another core has written. So the same threads do the work of a critic from beginning to end,
// as many critics at a time as the threads can be divided among. What several threads share, always the actor, is
// divided by rows of the minibatch: each thread computes the gradients of its own rows, and then adds all threads'
// gradients of a part of the parameters.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <torch/custom_class.h>

namespace {

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

// Columns of an update's metrics, under their log keys: those of each with categorical critics, of each update, of each
// with the actor's, and of each with a learned entropy coefficient's. So those that there are lie side by side
#define CATEGORICAL_METRICS(X) X(clipped_target_mass)
#define CRITIC_METRICS(X) X(critic_loss) X(q_value) X(target_q_value) X(critic_grad_norm) X(ent_coef) X(finite)
#define ACTOR_METRICS(X) X(actor_loss) X(entropy) X(log_std) X(saturated_actions) X(actor_grad_norm)
#define ENT_COEF_METRICS(X) X(ent_coef_loss)
namespace metric {
#define COLUMN(name) name,
enum { CATEGORICAL_METRICS(COLUMN) CRITIC_METRICS(COLUMN) ACTOR_METRICS(COLUMN) ENT_COEF_METRICS(COLUMN) N };
}  // namespace metric

class Update : public torch::CustomClassHolder {
 public:
  // Networks come as Parts. Trained parameters have exp_avg, exp_avg_sq and step with them; the actor's last layers are
  // mu and log_std, which have no kind. An entropy coefficient that is learned is its logarithm
  Update(std::vector<Tensors> actor, std::vector<int64_t> actor_kinds, std::vector<std::vector<Tensors>> critics,
         std::vector<std::vector<Tensors>> targets, std::vector<int64_t> critic_kinds, Tensors ent_coef,
         std::optional<Tensor> atoms)
      : actor_({actor, actor_kinds}),
        ent_coef_(ent_coef.data(), ent_coef.size() > 1),
        learns_ent_coef_(ent_coef.size() > 1),
        n_actions_(actor_.mu.out) {
    for (auto [name, number] : options_.named()) numbers_.push_back(number);
    for (size_t i = 0; i < critics.size(); i++) {
      critics_.emplace_back(Parts{critics[i], critic_kinds}, Parts{targets[i], critic_kinds});
    }
    head_.n = critics_[0].own.layers.back().out;
    if (atoms) head_.given_atoms = *atoms;
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
    return {{CATEGORICAL_METRICS(NAME)}, {CRITIC_METRICS(NAME)}, {ACTOR_METRICS(NAME)}, {ENT_COEF_METRICS(NAME)}};
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
    actor_.own.prepare(eps());
    for (Critic& critic : critics_) {
      critic.own.prepare(eps());
      critic.target.prepare(eps());
    }
  }

  bool find_tensors() {
    bool found = ent_coef_.find() && head_.find();
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
    // Of what a critic reads; and those of them that are of stored actions, and of next ones
    const Range all_rows = team.mates.of(is_joint ? 2 * size : size);
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
        if (of.begin == of.end) return;
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
        if (head_.is_categorical()) {
          const auto [loss, value] = head_.differentiate_loss(&target_[i * head_.n], 1.0f / (size * n_critics), outputs);
          sums.critic_loss += loss;
          sums.q_value += value;
          continue;
        }
        sums.q_value += *outputs;
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

  // Unit norms, running statistics, and the factors made of both, after a step of an optimiser
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
        float* to = &joint_observations_[row * n_observations];
        std::copy_n(half + row % batch.size * n_observations, n_observations, to);
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
                       std::vector<std::vector<Tensors>>, std::vector<int64_t>, Tensors, std::optional<Tensor>>())
      .def("option_names", &Update::option_names)
      .def("metric_names", &Update::metric_names)
      .def("run", &Update::run);
}
