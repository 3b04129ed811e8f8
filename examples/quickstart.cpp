/// Trains a byte-level BlackMamba on a text, measures it on the text's held-out tail, generates from it, and checks its
/// checkpoint. Usage: quickstart --text FILE[:WEIGHT] [--text ...] [--device auto|cpu|cuda] [--size small|large]
/// [--steps N] [--seed N] [--checkpoint FILE]
#include "support/quickstart_run.hpp"

#include <cstring>
#include <exception>
#include <initializer_list>

namespace bm = blackmamba;
using quickstart::arguments;

std::string one_of(char const* option, std::string const& value, std::initializer_list<char const*> known) {
  std::string expected;
  for (char const* k : known) {
    if (value == k) return value;
    expected += (expected.empty() ? "" : ", ") + std::string(k);
  }
  throw bm::value_error(std::string("quickstart: ") + option + ": got '" + value + "', expected one of " + expected);
}

arguments parse(int argc, char** argv) {
  arguments a;
  for (int i = 1; i < argc; ++i) {
    auto const is = [&](char const* name) { return std::strcmp(argv[i], name) == 0; };
    if (!(is("--text") || is("--steps") || is("--seed") || is("--checkpoint") || is("--device") || is("--size")) ||
        i + 1 == argc)
      throw bm::value_error(std::string("quickstart: got '") + argv[i] +
                            "', expected --text FILE[:WEIGHT], --device D, --size S, --steps N, --seed N or "
                            "--checkpoint FILE");
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
    } else if (is("--device")) {
      a.device = one_of("--device", value, {"auto", "cpu", "cuda"});
    } else if (is("--size")) {
      a.size = one_of("--size", value, {"small", "large"});
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

int run(arguments const& a) {
  if (a.device == "cuda" || (a.device == "auto" && quickstart::cuda_is_here())) return quickstart::run_on_cuda(a);
  if (a.size == "large")
    throw bm::value_error("quickstart: --size large: got the CPU, expected a CUDA device; training would take days");
  return quickstart::run<quickstart_small, bm::device::cpu, float>(a, "the CPU");
}

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (std::exception const& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return EXIT_FAILURE;
  }
}
