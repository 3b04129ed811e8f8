/// Trains a byte-level BlackMamba on a text, measures it on the text's held-out tail, generates from it, and checks its
/// checkpoint. Usage: quickstart --text FILE[:WEIGHT] [--text ...] [--steps N] [--seed N] [--checkpoint FILE]
#include "support/progress.hpp"
#include "support/quickstart_model.hpp"
#include "support/text.hpp"

#include <blackmamba/blackmamba.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace bm = blackmamba;

using network_type = bm::network<bm::blackmamba_model<quickstart_config>, bm::device::cpu>;

struct arguments {
  bm::corpus corpus{1};
  std::string all_text;
  std::int64_t steps = 1500;
  std::uint64_t seed = 1;
  std::string checkpoint = "quickstart.safetensors";
};

arguments parse(int argc, char** argv) {
  arguments a;
  for (int i = 1; i < argc; ++i) {
    auto const is = [&](char const* name) { return std::strcmp(argv[i], name) == 0; };
    if (!(is("--text") || is("--steps") || is("--seed") || is("--checkpoint")) || i + 1 == argc)
      throw bm::value_error(std::string("quickstart: got '") + argv[i] +
                            "', expected --text FILE[:WEIGHT], --steps N, --seed N or --checkpoint FILE");
    std::string value = argv[i + 1];
    if (is("--text")) {
      double weight = 1;
      if (auto const colon = value.rfind(':'); colon != std::string::npos && colon + 1 < value.size()) {
        char* end = nullptr;
        double const w = std::strtod(value.c_str() + colon + 1, &end);
        if (*end == 0) {
          weight = w;
          value.resize(colon);
        }
      }
      a.corpus.add_file(value, weight);
      a.all_text += a.corpus.text(static_cast<std::size_t>(a.corpus.texts() - 1));
    } else if (is("--checkpoint")) {
      a.checkpoint = value;
    } else {
      char* end = nullptr;
      long long const n = std::strtoll(value.c_str(), &end, 10);
      if (*end != 0 || value.empty() || n < 1)
        throw bm::value_error(std::string("quickstart: ") + argv[i] + ": got '" + value +
                              "', expected a number from 1");
      if (is("--steps")) a.steps = n;
      if (is("--seed")) a.seed = static_cast<std::uint64_t>(n);
    }
    ++i;
  }
  if (a.corpus.texts() == 0) throw bm::value_error("quickstart: no text; give --text FILE");
  return a;
}

/// Rows of length + 1 bytes that follow one another, as many as fill whole batches (at most `most` rows).
bm::token_batch windows(std::string const& bytes, std::int64_t length, std::int64_t batch, std::int64_t most) {
  std::int64_t rows = std::min((static_cast<std::int64_t>(bytes.size()) - 1) / length, most) / batch * batch;
  if (rows <= 0)
    throw bm::value_error("quickstart: the held-out text has " + std::to_string(bytes.size()) +
                          " bytes, expected at least " + std::to_string(batch * length + 1));
  bm::token_batch t(rows, length + 1);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i <= length; ++i)
      t(r, i) = static_cast<unsigned char>(bytes[static_cast<std::size_t>(r * length + i)]);
  return t;
}

double busiest(std::vector<bm::expert_statistics> const& layers) {
  double worst = 0;
  for (auto const& layer : layers) worst = std::max(worst, layer.max_over_mean());
  return worst;
}
std::string bars(bm::expert_statistics const& layer) {
  static char const* const heights[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  std::int64_t const most = std::max<std::int64_t>(*std::max_element(layer.load.begin(), layer.load.end()), 1);
  std::string chart;
  for (auto n : layer.load) chart += heights[(n * 8 + most - 1) / most];
  return chart;
}
/// Draws each layer's tokens per expert where Sinkhorn balances them, and on held-out text, where each token goes to
/// the expert that it prefers.
void show_experts(std::vector<bm::expert_statistics> const& training,
                  std::vector<bm::expert_statistics> const& held_out) {
  std::printf("\ntokens per expert           last training step              held-out text\n");
  std::printf("                            busiest/mean  Sinkhorn          busiest/mean\n");
  for (std::size_t i = 0; i < training.size(); ++i)
    std::printf("  %-23s %s     %.2f  %2d passes, error %.0e    %s     %.2f\n", training[i].layer.c_str(),
                bars(training[i]).c_str(), training[i].max_over_mean(), training[i].balance.passes,
                static_cast<double>(training[i].balance.error), bars(held_out[i]).c_str(), held_out[i].max_over_mean());
}

/// Median microseconds of a decoding step around the given position.
double decode_time(bm::generator<network_type>& from, std::int64_t position) {
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

int run(int argc, char** argv) {
  arguments const a = parse(argc, argv);
  constexpr std::int64_t batch = quickstart_batch, length = quickstart_length;
  a.corpus.check_length(length + 1);

  network_type network(a.seed);
  auto const count = bm::count_parameters<network_type::arch>();
  bm::trainer train(network, {.batch = batch,
                              .length = length,
                              .learning_rate = {.peak = 6e-3, .final = 3e-4, .warmup = 60, .steps = a.steps},
                              .weight_decay = 0.05});
  std::printf("BlackMamba on the CPU: %lld parameters, %lld active for a token, %d layers, 8 experts\n",
              static_cast<long long>(count.total), static_cast<long long>(count.active), count.layers);
  std::printf("text: %lld bytes for training; workspace %.1f MB\n", static_cast<long long>(a.corpus.training_bytes()),
              static_cast<double>(train.workspace_bytes()) * 1e-6);

  progress bar(a.steps, batch * length);
  for (std::int64_t step = 1; step <= a.steps; ++step) {
    auto const first = static_cast<std::uint64_t>((step - 1) * batch);
    bar.update(step, train.step(a.corpus.sample(first, batch, length + 1)).loss);
  }
  auto const training_load = bm::expert_statistics_of(network);
  double const tokens_per_second = static_cast<double>(a.steps * batch * length) / bar.seconds();

  double const bits = train.evaluate(windows(a.corpus.held_out(), length, batch, 1024)) / std::log(2.0);
  double const h0 = text::conditional_entropy(a.all_text, 0), h1 = text::conditional_entropy(a.all_text, 1),
               h2 = text::conditional_entropy(a.all_text, 2);
  auto const xz = text::xz_bits_per_byte(a.all_text);
  std::printf("\nbits per byte: %.3f held out; the text's entropy of order 0: %.3f, 1: %.3f, 2: %.3f; xz -9: %s\n",
              bits, h0, h1, h2, xz ? std::to_string(*xz).substr(0, 5).c_str() : "not installed");
  auto const held_out_load = bm::expert_statistics_of(network);
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
  std::printf(
      "{\"held_out_bits_per_byte\":%.4f,\"order1_entropy\":%.4f,\"order2_entropy\":%.4f,\"tokens_per_second\":%.1f,"
      "\"max_over_mean_expert_load\":%.4f,\"held_out_max_over_mean_expert_load\":%.4f,\"decode_us_per_token_at_100\":%."
      "2f,"
      "\"decode_us_per_token_at_20000\":%.2f,\"state_bytes\":%lld,\"parameters\":%lld,\"active_parameters\":%lld}\n",
      bits, h1, h2, tokens_per_second, busiest(training_load), busiest(held_out_load), at_100, at_20000,
      static_cast<long long>(timed.state().bytes()), static_cast<long long>(count.total),
      static_cast<long long>(count.active));
  return same ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (std::exception const& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return EXIT_FAILURE;
  }
}
