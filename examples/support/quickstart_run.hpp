#pragma once
#include "support/progress.hpp"
#include "support/quickstart_model.hpp"
#include "support/text.hpp"

#include <blackmamba/blackmamba.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

/// What the quickstart does, once for every device and size.
namespace quickstart {

namespace bm = blackmamba;

struct arguments {
  bm::corpus corpus{1};
  std::string all_text;
  std::int64_t steps = 0;  // 0: as many as go with the model's size
  std::uint64_t seed = 1;
  std::string device = "auto";
  std::string size = "small";
  std::string checkpoint = "quickstart.safetensors";
};

/// Rows of length + 1 bytes, the first byte of each the last of the one before: whole batches of them, from all over
/// the held-out text where not all are taken, because they would not fill a batch or are more than `most`.
inline bm::token_batch windows(std::string const& bytes, std::int64_t length, std::int64_t batch, std::int64_t most) {
  std::int64_t const all = (static_cast<std::int64_t>(bytes.size()) - 1) / length;
  std::int64_t const rows = std::min(all, most) / batch * batch;
  if (rows <= 0)
    throw bm::value_error("quickstart: the texts' held-out tenth has " + std::to_string(bytes.size()) +
                          " bytes, expected at least " + std::to_string(batch * length + 1) +
                          " (one batch); give it a text of " + std::to_string(10 * (batch * length + 1)) +
                          " bytes or more");
  bm::token_batch t(rows, length + 1);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i <= length; ++i)
      t(r, i) = static_cast<unsigned char>(bytes[static_cast<std::size_t>(r * all / rows * length + i)]);
  return t;
}

/// What a model makes of text that it has not seen.
struct measurement {
  double bits = 0;  // per byte
  std::vector<bm::expert_statistics> experts;  // their load over all of it
};
/// Evaluates batch after batch, because the network counts the tokens of each expert in one.
template <class Network>
measurement measure(bm::trainer<Network>& train, bm::token_batch const& held_out) {
  measurement m;
  std::int64_t const batch = train.options().batch, rows = held_out.extent(0);
  for (std::int64_t r = 0; r < rows; r += batch) {
    double const share = static_cast<double>(batch) / static_cast<double>(rows);
    m.bits += train.evaluate(held_out.slice(r, batch)) / std::log(2.0) * share;
    auto const of_batch = bm::expert_statistics_of(train.network());
    if (r == 0) {
      m.experts = of_batch;
      continue;
    }
    for (std::size_t i = 0; i < of_batch.size(); ++i) {
      m.experts[i].unrouted += of_batch[i].unrouted;
      std::ranges::transform(m.experts[i].load, of_batch[i].load, m.experts[i].load.begin(), std::plus<>());
    }
  }
  return m;
}

inline double busiest(std::vector<bm::expert_statistics> const& layers) {
  double worst = 0;
  for (auto const& layer : layers) worst = std::max(worst, layer.max_over_mean());
  return worst;
}
inline std::string bars(bm::expert_statistics const& layer) {
  static char const* const heights[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  std::int64_t const most = std::max<std::int64_t>(*std::max_element(layer.load.begin(), layer.load.end()), 1);
  std::string chart;
  for (auto n : layer.load) chart += heights[(n * 8 + most - 1) / most];
  return chart;
}
/// Draws each layer's tokens per expert where Sinkhorn balances them, and on held-out text, where each token goes to
/// the expert that it prefers.
inline void show_experts(std::vector<bm::expert_statistics> const& training,
                         std::vector<bm::expert_statistics> const& held_out) {
  std::printf("\ntokens per expert           last training step              held-out text\n");
  std::printf("                            busiest/mean  Sinkhorn          busiest/mean\n");
  for (std::size_t i = 0; i < training.size(); ++i)
    std::printf("  %-23s %s     %.2f  %2d passes, error %.0e    %s     %.2f\n", training[i].layer.c_str(),
                bars(training[i]).c_str(), training[i].max_over_mean(), training[i].balance.passes,
                static_cast<double>(training[i].balance.error), bars(held_out[i]).c_str(), held_out[i].max_over_mean());
}

/// Median microseconds of a decoding step around the given position.
template <class Network>
double decode_time(bm::generator<Network>& from, std::int64_t position) {
  std::int32_t byte = ' ';
  while (from.position() < position) from.step({&byte, 1});
  std::vector<double> us;
  for (int i = 0; i < 64; ++i) {
    auto const start = std::chrono::steady_clock::now();
    from.step({&byte, 1});
    us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(us.begin(), us.begin() + 32, us.end());
  return us[32];
}

/// The main job for a model (quickstart_model.hpp) on a device, with weights and activations stored as T.
/// @param place what the device is called
/// @param peak_bytes the most memory that was held on the device so far, where it has memory of its own
template <class Model, bm::device_policy Policy, bm::storage T>
int run(arguments const& a, std::string const& place, std::function<std::size_t()> const& peak_bytes = {}) {
  using network_type = bm::network<bm::blackmamba_model<Model>, Policy, T>;
  constexpr std::int64_t batch = Model::batch, length = Model::length;
  std::int64_t const steps = a.steps > 0 ? a.steps : Model::steps;
  a.corpus.check_length(length + 1);
  std::string const held_out_text = a.corpus.held_out();
  // At most half a million bytes are measured: seconds beside the minutes of training.
  bm::token_batch const held_out = windows(held_out_text, length, batch, (1 << 19) / length);

  network_type network(a.seed);
  auto const count = bm::count_parameters<typename network_type::arch>();
  bm::trainer train(network,
                    {.batch = batch,
                     .length = length,
                     .learning_rate = {.peak = Model::peak, .final = Model::final, .warmup = 60, .steps = steps},
                     .weight_decay = 0.05});
  std::printf("BlackMamba on %s, %s: %lld parameters, %lld active for a token, %d layers, 8 experts\n", place.c_str(),
              bm::type_name<T>(), static_cast<long long>(count.total), static_cast<long long>(count.active),
              count.layers);
  std::printf("text: %lld bytes for training; workspace %.1f MB\n", static_cast<long long>(a.corpus.training_bytes()),
              static_cast<double>(train.workspace_bytes()) * 1e-6);

  progress bar(steps, batch * length);
  for (std::int64_t step = 1; step <= steps; ++step) {
    auto const first = static_cast<std::uint64_t>((step - 1) * batch);
    bar.update(step, train.step(a.corpus.sample(first, batch, length + 1)).loss);
  }
  auto const training_load = bm::expert_statistics_of(network);
  double const tokens_per_second = static_cast<double>(steps * batch * length) / bar.seconds();

  auto const [bits, held_out_load] = measure(train, held_out);
  double const h0 = text::conditional_entropy(a.all_text, 0), h1 = text::conditional_entropy(a.all_text, 1),
               h2 = text::conditional_entropy(a.all_text, 2);
  auto const xz = text::xz_bits_per_byte(a.all_text);
  std::printf("\nbits per byte: %.3f on %lld of %lld held-out bytes; the text's entropy of order 0: %.3f, 1: %.3f, "
              "2: %.3f; xz -9: %s\n",
              bits, static_cast<long long>(held_out.extent(0) * length), static_cast<long long>(held_out_text.size()),
              h0, h1, h2, xz ? std::to_string(*xz).substr(0, 5).c_str() : "not installed");
  show_experts(training_load, held_out_load);

  std::string const prompt = "In the beginning ";
  auto const prompt_tokens = bm::byte_tokens(prompt);
  bm::generator speak(network);
  std::printf("\n%s", prompt.c_str());
  bm::generate(speak, prompt_tokens, 400, {.temperature = 0.8, .top_p = 0.95, .seed = a.seed}, [](std::int32_t byte) {
    std::putchar(byte);
    std::fflush(stdout);
    return true;
  });

  train.save(a.checkpoint);
  network_type again(a.seed + 1);
  bm::load_weights(again, a.checkpoint);
  bm::generator first(network), second(again);
  first.prefill(prompt_tokens);
  second.prefill(prompt_tokens);
  bool const same = std::ranges::equal(first.logits(), second.logits());
  std::printf("\n\ncheckpoint %s: read back, logits are %s\n", a.checkpoint.c_str(),
              same ? "the same bits" : "DIFFERENT");

  bm::generator timed(network);
  double const at_100 = decode_time(timed, 100), at_20000 = decode_time(timed, 20000);
  std::printf("decoding: %.0f us per token at position 100, %.0f at 20000; state %lld bytes\n\n", at_100, at_20000,
              static_cast<long long>(timed.state().bytes()));
  std::string const device_bytes =
      peak_bytes ? ",\"peak_device_bytes\":" + std::to_string(peak_bytes()) : std::string();
  std::printf(
      "{\"held_out_bits_per_byte\":%.4f,\"order1_entropy\":%.4f,\"order2_entropy\":%.4f,\"tokens_per_second\":%.1f,"
      "\"max_over_mean_expert_load\":%.4f,\"held_out_max_over_mean_expert_load\":%.4f,"
      "\"decode_us_per_token_at_100\":%.2f,\"decode_us_per_token_at_20000\":%.2f,\"state_bytes\":%lld,"
      "\"parameters\":%lld,\"active_parameters\":%lld%s}\n",
      bits, h1, h2, tokens_per_second, busiest(training_load), busiest(held_out_load), at_100, at_20000,
      static_cast<long long>(timed.state().bytes()), static_cast<long long>(count.total),
      static_cast<long long>(count.active), device_bytes.c_str());
  return same ? EXIT_SUCCESS : EXIT_FAILURE;
}

/// Whether this program was built with CUDA and a usable device is there.
bool cuda_is_here();
/// The main job on the current CUDA device. @throws value_error in a build without CUDA
int run_on_cuda(arguments const& a);

}  // namespace quickstart
