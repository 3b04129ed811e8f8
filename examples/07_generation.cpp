/// Generates: a prompt is read once, its state forked, and continued with different samplers.
#include <blackmamba/blackmamba.hpp>

#include <cstdio>
#include <string>

namespace bm = blackmamba;

struct config {
  static constexpr int d_model = 48, layers = 4, d_ff = 96, experts = 4, vocab = 128;
};

int main() {
  // A model that has learned one sentence by heart, so that there is something to read.
  std::string const sentence = "The serpent sheds its skin to be born again. ";
  std::string text;
  while (text.size() < 8000) text += sentence;
  bm::corpus corpus(1);
  corpus.add("sentence", text);
  bm::network<bm::blackmamba_model<config>, bm::device::cpu> net(1);
  bm::trainer train(
      net, {.batch = 4, .length = 64, .learning_rate = {.peak = 8e-3, .final = 8e-4, .warmup = 10, .steps = 300}});
  for (std::uint64_t step = 0; step < 300; ++step) train.step(corpus.sample(4 * step, 4, 65));

  bm::generator speak(net);
  speak.prefill(bm::byte_tokens("The serpent "));
  auto const fork = speak.state();  // everything the model remembers of the prompt, in constant space

  struct {
    char const* name;
    bm::sampling_options how;
  } const samplers[] = {{"greedy", {.temperature = 0}},
                        {"temperature 1", {.seed = 1}},
                        {"hot, top_k 5", {.temperature = 2, .top_k = 5, .seed = 2}},
                        {"top_p 0.9", {.top_p = 0.9, .seed = 3}}};
  std::string said[4];
  for (std::size_t i = 0; i < 4; ++i) {
    speak.restore(fork);
    said[i] = "The serpent s";
    bm::generate(speak, bm::byte_tokens("s"), 60, samplers[i].how, [&](std::int32_t byte) {
      said[i] += static_cast<char>(byte);
      return byte != '.';  // end of the sentence: stop
    });
    std::printf("%-14s %s\n", samplers[i].name, said[i].c_str());
  }
  return said[0] + " " == sentence ? 0 : 1;  // what it learned is what it says where nothing is left to chance
}
