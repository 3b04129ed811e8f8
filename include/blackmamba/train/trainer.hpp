#pragma once
#include <blackmamba/core/recording.hpp>
#include <blackmamba/model/checkpoint.hpp>
#include <blackmamba/model/network.hpp>
#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/train/schedule.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace blackmamba {

/// Validated where a trainer is built.
struct training_options {
  std::int64_t batch = 8;          ///< sequences of a forward pass
  std::int64_t length = 256;       ///< tokens of a sequence
  std::int64_t accumulation = 1;   ///< forward passes of an optimizer step
  warmup_cosine learning_rate = {};
  double weight_decay = 0.1;       ///< of matrices; vectors do not decay
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double max_norm = 1;             ///< of the gradient; 0 clips nothing
};

/// What an optimizer step did.
struct step_report {
  std::int64_t step = 0;       ///< 1 for the first
  double loss = 0;             ///< mean of -ln p(next token)
  double gradient_norm = 0;    ///< before clipping
  double learning_rate = 0;
};

/// Trains a network: forward, backward, AdamW. All memory is taken when the trainer is built, its size found by a dry
/// run of the same step; after the second a step allocates nothing on the device.
///
/// Weights in 16-bit storage have fp32 masters here, taken from the network's weights when the trainer is built and
/// again whenever others change those (network::version). Gradients, moments and the residual stream are fp32 (double
/// for double).
///
/// Bytes, with t = sizeof(T), a = sizeof(accum_t<T>), P parameters, d_inner = expand d_model: the network t P
/// and the trainer 3 a P (a P more of masters where t < a); activations for each token of the batch of
///
///   a mamba layer   (a + t) d_model + t (5 d_inner + dt_rank + 2 d_state) + a d_inner d_state / chunk
///   an moe layer    (a + t) d_model + a E + t k (2 d_model + d_fc1 + d_ff) + k (a + 12)
///   the output      t (2 d_model + vocab) + a (d_model + 1)
///
/// where chunk is the number of steps between the scan's checkpoints; of size B L d_inner d_state nothing is stored.
/// Backward adds what one layer needs. workspace_bytes() is the exact sum.
template <class Network>
class trainer {
 public:
  using P = typename Network::policy_type;
  using T = typename Network::storage_type;
  using A = accum_t<T>;
  using S = typename Network::space_type;
  using arch = typename Network::arch;
  using gradient_memory = parameter_memory<arch, S, A>;
  static constexpr bool has_masters = !std::is_same_v<T, A>;

  /// @throws value_error where an option is outside its domain; workspace_error
  trainer(Network& network, training_options const& options)
      : network_(network),
        options_(checked(options)),
        gradient_(network.policy(), true),
        first_moment_(network.policy(), true),
        second_moment_(network.policy(), true),
        token_(options.accumulation * options.batch * options.length),
        target_(options.accumulation * options.batch * options.length),
        losses_(zeros<A>(network.policy(), options.accumulation)),
        norm_(zeros<A>(network.policy(), 1)),
        schedule_(zeros<double>(network.policy(), 3)),
        workspace_(measure()) {
    if constexpr (has_masters) {
      master_ = tensor<S, A, dyn>(network.memory().matrices().size());
      take_masters();
    }
  }

  /// One optimizer step on tokens (accumulation * batch, length + 1): every token but the last predicts the next.
  /// @throws shape_error; value_error where the loss or the gradient's norm is not finite. With a norm that is not
  /// finite weights and moments are unchanged; a loss alone, from a target whose logit is -infinity, stops no update.
  step_report step(host_view<std::int32_t const, dyn, dyn> tokens) {
    check_shape("trainer.step", "tokens", tokens, {options_.accumulation * options_.batch, options_.length + 1});
    P const policy = device();
    stage(policy, "trainer.step", tokens);
    step_report report{.step = step_ + 1, .learning_rate = options_.learning_rate(step_ + 1)};
    adamw::options const how = optimizer_options(report);
    memory::upload(policy, host_view<double const, dyn>(adamw::schedule_of(how).data(), 3), schedule_.as_view());
    A const scale = static_cast<A>(1.0 / static_cast<double>(tokens.extent(0) * options_.length));
    follow_weights();
    recorded_.run(policy, [&](P const& p) { optimizer_step(p, scale, how); });
    changed_weights();
    tensor<space::host, A, dyn> losses(options_.accumulation), norm(1);
    memory::download(policy, losses_.as_view(), losses.as_view());
    memory::download(policy, norm_.as_view(), norm.as_view());
    for (std::int64_t i = 0; i < options_.accumulation; ++i) report.loss += static_cast<double>(losses(i) * scale);
    report.gradient_norm = static_cast<double>(norm(0));
    bool const updated = std::isfinite(report.gradient_norm);  // the optimizer looks at the norm alone
    if (updated) ++step_;
    if (!updated || !std::isfinite(report.loss))
      throw value_error("trainer.step: step " + std::to_string(report.step) + ": loss is " +
                        std::to_string(report.loss) + ", gradient norm is " + std::to_string(report.gradient_norm) +
                        ", expected finite numbers; the weights are " + (updated ? "updated" : "unchanged"));
    return report;
  }

  /// Mean of -ln p(next token) over tokens (rows, length + 1), rows a multiple of the batch; nothing is learned and no
  /// balance rule acts. Tokens per expert are recorded in the network, those of the last batch.
  double evaluate(host_view<std::int32_t const, dyn, dyn> tokens) {
    check_shape("trainer.evaluate", "tokens", tokens, {-1, options_.length + 1});
    check_that(tokens.extent(0) % options_.batch == 0, "trainer.evaluate", "tokens",
               std::to_string(tokens.extent(0)) + " rows", "a multiple of " + std::to_string(options_.batch));
    P const policy = device();
    double total = 0;
    for (std::int64_t r = 0; r < tokens.extent(0); r += options_.batch) {
      stage(policy, "trainer.evaluate", tokens.slice(r, options_.batch));
      context<P> c{.policy = policy, .batch = options_.batch, .length = options_.length, .observe = true};
      auto const n = c.tokens();
      evaluate_batch<P>(c, network_.parameters(), token_.slice(0, n), target_.slice(0, n), losses_.slice(0, 1));
      tensor<space::host, A, dyn> loss(1);
      memory::download(policy, losses_.slice(0, 1), loss.as_view());
      total += static_cast<double>(loss(0));
      if (!std::isfinite(total))
        throw value_error("trainer.evaluate: rows " + std::to_string(r) + " to " +
                          std::to_string(r + options_.batch - 1) + ": loss is " + std::to_string(total) +
                          ", expected a finite number");
    }
    return total / static_cast<double>(std::max<std::int64_t>(tokens.extent(0) * options_.length, 1));
  }

  Network& network() { return network_; }
  training_options const& options() const { return options_; }
  std::int64_t step_count() const { return step_; }
  /// Whether a step is one replay of a recorded graph by now; on cuda, from the second on.
  bool recorded() const { return recorded_.recorded(); }
  /// The gradient of the last step, before clipping.
  gradient_memory const& gradient() const { return gradient_; }
  /// Bytes of the arena, found by the dry run.
  std::size_t workspace_bytes() const { return workspace_.capacity(); }

  /// Writes weights, balance offsets, masters, moments and the step, and what a step is made of: storage type, batch,
  /// length and accumulation. A run that continues from the file with the same options goes on bit for bit, with the
  /// examples from step_count() * batch * accumulation on. The file appears whole or not at all. @throws file_error
  void save(std::string const& path) const {
    follow_weights();
    safetensors::writer file(path);
    P const policy = network_.policy();
    file.metadata("format", file_format);
    file.metadata("storage", type_name<T>());
    file.metadata("step", std::to_string(step_));
    for (auto const& [name, value] : step_sizes()) file.metadata(name, std::to_string(value));
    detail::write_traits<arch>(file, true);
    detail::declare_tensors<Network>(file, network_.memory(), "");
    detail::declare_tensors<Network>(file, first_moment_, "first_moment/");
    detail::declare_tensors<Network>(file, second_moment_, "second_moment/");
    if constexpr (has_masters) file.declare<A>("master/matrices", {master_.size()});
    detail::write_tensors<Network>(file, network_.memory(), policy);
    detail::write_tensors<Network>(file, first_moment_, policy);
    detail::write_tensors<Network>(file, second_moment_, policy);
    if constexpr (has_masters) {
      tensor<space::host, A, dyn> host(master_.size());
      memory::download(policy, master_.as_view(), host.as_view());
      file.write(host.data(), host.size());
    }
    file.finish();
  }
  /// Continues from a file that save() wrote, with any storage type and on any device: masters, where the file has
  /// them, are the weights of a trainer without; a trainer with masters takes a file's weights as these where it has
  /// none. Batch, length, accumulation and the architecture, its balance rule's options included, must be the file's;
  /// the other options may differ.
  ///
  /// The file is checked and read in whole, into as much host memory as it is long, before anything changes: where
  /// file_error or workspace_error is thrown, network and trainer are as they were.
  /// @throws file_error naming the first thing that differs, got and expected
  void load(std::string const& path) {
    safetensors::reader file(path);
    bool const masters = check_file(file);
    std::int64_t const step = file.whole_number("step");
    staged const weights(file, network_.memory(), "");
    staged_moments const first(file, first_moment_, "first_moment/"), second(file, second_moment_, "second_moment/");
    auto const matrices = network_.memory().matrices();
    tensor<space::host, A, dyn> exact(masters ? matrices.size() : 0);
    if (masters) file.read("master/matrices", exact.data(), exact.size());
    bool const rounded = file.metadata("storage") != type_name<T>();

    P const policy = network_.policy();
    changed_weights();
    weights.upload(policy);
    first.upload(policy);
    second.upload(policy);
    if constexpr (has_masters) {
      if (masters) memory::upload(policy, exact.as_view(), master_.as_view());
      if (!masters) take_masters();
      if (masters && rounded) memory::copy(policy, master_.as_view(), matrices);
    } else if (masters) {
      memory::upload(policy, exact.as_view(), matrices);
    }
    step_ = step;
  }

 private:
  using staged = detail::staged_tensors<Network, typename Network::memory_type>;
  using staged_moments = detail::staged_tensors<Network, gradient_memory>;
  static constexpr char const* file_format = "blackmamba training 2";

  static training_options const& checked(training_options const& o) {
    auto const check = [](bool good, char const* name, auto got, char const* expected) {
      if (!good)
        throw value_error("trainer: " + std::string(name) + ": got " + std::to_string(got) + ", expected " + expected);
    };
    auto const not_negative = [&](char const* name, double x) {
      check(std::isfinite(x) && x >= 0, name, x, "a finite number from 0");
    };
    check(o.batch >= 1, "batch", o.batch, "at least 1");
    check(o.length >= 1, "length", o.length, "at least 1");
    check(o.accumulation >= 1, "accumulation", o.accumulation, "at least 1");
    not_negative("learning_rate.peak", o.learning_rate.peak);
    not_negative("learning_rate.final", o.learning_rate.final);
    check(o.learning_rate.warmup >= 0, "learning_rate.warmup", o.learning_rate.warmup, "at least 0");
    check(o.learning_rate.steps >= 0, "learning_rate.steps", o.learning_rate.steps, "at least 0");
    not_negative("weight_decay", o.weight_decay);
    check(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "in [0, 1)");
    check(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "in [0, 1)");
    not_negative("eps", o.eps);
    not_negative("max_norm", o.max_norm);
    return o;
  }

  /// Sizes that a file's step and this one's must share for the one to continue the other.
  std::vector<std::pair<char const*, std::int64_t>> step_sizes() const {
    return {{"batch", options_.batch}, {"length", options_.length}, {"accumulation", options_.accumulation}};
  }
  /// All that can be wrong with a file except that its disk fails. @returns whether it has masters
  bool check_file(safetensors::reader const& file) const {
    auto const& metadata = file.header().metadata;
    auto const format = metadata.find("format");
    if (format == metadata.end() || format->second == "blackmamba weights 1")
      throw file_error(file.path() + ": holds weights without a trainer's state; load it with load_weights");
    if (format->second != file_format)
      throw file_error(file.path() + ": format: got '" + format->second + "', expected '" + file_format + "'");
    file.whole_number("step");
    for (auto const& [name, value] : step_sizes())
      if (auto const got = file.whole_number(name); got != value)
        throw file_error(file.path() + ": " + name + ": got " + std::to_string(got) + ", expected " +
                         std::to_string(value) +
                         "; build the trainer with the file's, or load its weights alone with load_weights");
    detail::check_tensors<Network>(file, network_.memory(), "", true);
    detail::check_tensors<Network>(file, first_moment_, "first_moment/", true);
    detail::check_tensors<Network>(file, second_moment_, "second_moment/", true);
    detail::check_traits<arch>(file, true);
    std::string const stored = file.metadata("storage");
    bool const masters = stored == type_name<bfloat16>() || stored == type_name<half>();
    if (!masters && stored != type_name<float>() && stored != type_name<double>())
      throw file_error(file.path() + ": storage: got '" + stored + "', expected float32, float64, bfloat16 or float16");
    if (masters) file.check<A>("master/matrices", network_.memory().matrices().size());
    return masters;
  }

  /// Masters from the network's weights.
  void take_masters() const {
    memory::copy(network_.policy(), network_.memory().matrices(), master_.as_view());
    seen_ = network_.version();
  }
  /// The same where others have changed the weights.
  void follow_weights() const {
    if constexpr (has_masters)
      if (seen_ != network_.version()) take_masters();
  }
  /// Tells others of weights that follow from the masters.
  void changed_weights() {
    network_.weights_changed();
    seen_ = network_.version();
  }

  P device() {
    P policy = network_.policy();
    policy.workspace = &workspace_;
    return policy;
  }

  /// Everything of a step that the device does: the same work on the same memory every time.
  void optimizer_step(P const& policy, A scale, adamw::options const& how) {
    memory::zero(policy, gradient_.flat());
    for (std::int64_t i = 0; i < options_.accumulation; ++i) {
      context<P> c{.policy = policy, .batch = options_.batch, .length = options_.length, .training = true};
      auto const n = c.tokens();
      accumulate_gradient<P>(c, network_.parameters(), token_.slice(i * n, n), target_.slice(i * n, n),
                             losses_.slice(i, 1), scale, gradient_.views());
    }
    adamw::norm<P, A>(policy, gradient_.flat(), norm_);
    update(policy, how);
  }

  /// Forward, loss and backward of one batch under any policy that shares the memory space: P itself, or its dry run.
  template <device_policy Q>
  static void accumulate_gradient(context<Q> const& c, typename Network::parameters_type const& p,
                                  view<S, std::int32_t const, dyn> token, view<S, std::int32_t const, dyn> target,
                                  view<S, A, dyn> loss, A scale, typename gradient_memory::views_type const& gradient) {
    auto const scope = c.scope();
    auto const logits = c.template allocate<T>(c.tokens(), arch::vocab);
    auto const lse = c.template allocate<A>(c.tokens());
    typename arch::template saved<S, T> keep;
    arch::template forward<Q, T, T, S>(c, p, token, arch::rows::all, logits, keep);
    cross_entropy::forward<Q, T>(c.policy, {.logits = logits, .target = target}, {.loss = loss, .lse = lse});
    cross_entropy::backward<Q, T>(c.policy, {.logits = logits, .target = target, .lse = lse, .scale = scale}, logits);
    arch::template backward<Q, T, S>(c, p, keep, token, logits, gradient);
  }

  template <device_policy Q>
  static void evaluate_batch(context<Q> const& c, typename Network::parameters_type const& p,
                             view<S, std::int32_t const, dyn> token, view<S, std::int32_t const, dyn> target,
                             view<S, A, dyn> loss) {
    auto const scope = c.scope();
    auto const logits = c.template allocate<T>(c.tokens(), arch::vocab);
    typename arch::template saved<S, T> keep;
    arch::template forward<Q, T, T, S>(c, p, token, arch::rows::all, logits, keep);
    cross_entropy::forward<Q, T>(c.policy, {.logits = logits, .target = target}, {.loss = loss});
  }

  /// An arena of exactly the size that a step and an evaluation need.
  arena<S> measure() {
    using dry = device::dry<P>;
    auto measuring = arena<S>::measuring();
    context<dry> c{.policy = {.workspace = &measuring}, .batch = options_.batch, .length = options_.length};
    auto const token = token_.slice(0, c.tokens()), target = target_.slice(0, c.tokens());
    evaluate_batch<dry>(c, network_.parameters(), token, target, losses_.slice(0, 1));
    c.training = true;
    accumulate_gradient<dry>(c, network_.parameters(), token, target, losses_.slice(0, 1), A(1), gradient_.views());
    adamw::norm<dry, A>(c.policy, gradient_.flat(), norm_);
    return arena<S>(measuring.peak());
  }

  /// Inputs and targets of some rows, to the front of their memory. Checked here, for a device cannot complain.
  void stage(P const& policy, char const* who, host_view<std::int32_t const, dyn, dyn> tokens) {
    auto const rows = tokens.extent(0), length = tokens.extent(1) - 1;
    tensor<space::host, std::int32_t, dyn> token(rows * length), target(rows * length);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i <= length; ++i) {
        auto const t = tokens(r, i);
        if (t < 0 || t >= arch::vocab)
          throw value_error(std::string(who) + ": tokens: row " + std::to_string(r) + ", position " +
                            std::to_string(i) + " holds " + std::to_string(t) + ", expected 0 to " +
                            std::to_string(arch::vocab - 1));
        if (i < length) token(r * length + i) = t;
        if (i > 0) target(r * length + i - 1) = t;
      }
    memory::upload(policy, token.as_view(), token_.slice(0, rows * length));
    memory::upload(policy, target.as_view(), target_.slice(0, rows * length));
  }

  adamw::options optimizer_options(step_report const& report) const {
    return {.learning_rate = report.learning_rate,
            .beta1 = options_.beta1,
            .beta2 = options_.beta2,
            .eps = options_.eps,
            .step = report.step,
            .max_norm = options_.max_norm};
  }
  /// What changes from step to step is in schedule_; the rest of the options is the same every time.
  void update(P const& policy, adamw::options const& how) {
    auto const& weights = network_.memory();
    view<S, A, dyn> matrices;
    view<S, T, dyn> copy;
    if constexpr (has_masters) {
      matrices = master_;
      copy = weights.matrices();
    } else {
      matrices = weights.matrices();
    }
    adamw::segment<home<P>, T> const all[] = {{.parameter = matrices,
                                               .gradient = gradient_.matrices(),
                                               .first_moment = first_moment_.matrices(),
                                               .second_moment = second_moment_.matrices(),
                                               .copy = copy,
                                               .weight_decay = options_.weight_decay},
                                              {.parameter = weights.vectors(),
                                               .gradient = gradient_.vectors(),
                                               .first_moment = first_moment_.vectors(),
                                               .second_moment = second_moment_.vectors()}};
    adamw::step<P, T>(policy, all, norm_, how, schedule_);
  }

  Network& network_;
  training_options options_;
  gradient_memory gradient_;
  gradient_memory first_moment_;
  gradient_memory second_moment_;
  tensor<S, A, dyn> master_;
  tensor<S, std::int32_t, dyn> token_;
  tensor<S, std::int32_t, dyn> target_;
  tensor<S, A, dyn> losses_;
  tensor<S, A, dyn> norm_;
  tensor<S, double, dyn> schedule_;
  arena<S> workspace_;
  recording<P> recorded_;  // the whole optimizer step
  std::int64_t step_ = 0;
  mutable std::uint64_t seen_ = 0;  // version of the weights that the masters are those of
};

}  // namespace blackmamba
