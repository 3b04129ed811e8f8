/// Trains a small BlackMamba on a text in memory, saves it half-way, and shows that the run that continues from the
/// file is the same run.
#include <blackmamba/blackmamba.hpp>

#include <cmath>
#include <cstdio>
#include <string>

namespace bm = blackmamba;

struct config {
  static constexpr int d_model = 32, layers = 4, d_ff = 64, experts = 4, vocab = 128;
};
using network_type = bm::network<bm::blackmamba_model<config>, bm::device::cpu>;

int main() {
  bm::corpus corpus(/*seed=*/7);
  std::string rhyme;
  for (int verse = 0; verse < 100; ++verse)
    rhyme += "one two, buckle my shoe; three four, knock at the door; five six, pick up sticks; seven eight, lay them "
             "straight; nine ten, a big fat hen.\n";
  corpus.add("rhyme", rhyme);

  bm::training_options const options{.batch = 4,
                                     .length = 64,
                                     .learning_rate = {.peak = 8e-3, .final = 8e-4, .warmup = 10, .steps = 60}};
  network_type net(/*seed=*/1);
  bm::trainer train(net, options);
  auto const run_to = [&](auto& trainer, std::int64_t last) {
    bm::step_report report;
    while (trainer.step_count() < last) {
      auto const first = static_cast<std::uint64_t>(trainer.step_count() * options.batch);
      report = trainer.step(corpus.sample(first, options.batch, options.length + 1));
      if (report.step % 10 == 0)
        std::printf("step %2lld  loss %.3f  gradient norm %.2f  rate %.1e\n", static_cast<long long>(report.step),
                    report.loss, report.gradient_norm, report.learning_rate);
    }
    return report.loss;
  };
  run_to(train, 30);
  train.save("06_training.safetensors");
  double const straight = run_to(train, 60);

  std::printf("again from step 30:\n");
  network_type other(/*seed=*/2);
  bm::trainer resumed(other, options);
  resumed.load("06_training.safetensors");
  double const continued = run_to(resumed, 60);
  std::printf("last losses %.17g and %.17g\n", straight, continued);
  return straight == continued && straight < 1.5 ? 0 : 1;
}
