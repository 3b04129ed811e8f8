#include "support/files.hpp"
#include "support/models.hpp"

#include <blackmamba/model/checkpoint.hpp>

#include <clocale>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <string_view>
#include <sys/resource.h>

using namespace blackmamba;

namespace {
template <class T = float, class Arch = test::tiny_blackmamba>
using tiny_network = network<Arch, test_policy, T>;

/// Of the same shapes, each with one thing that is another.
template <class Routing, class Activation = swiglu>
using one_moe = language_model<test::tiny, prenorm<rms_norm, moe<test::tiny, Routing, Activation>>>;
template <class Rule>
using one_rule = one_moe<top1<Rule>>;
template <class Config>
using one_attention = language_model<Config, prenorm<rms_norm, self_attention<Config>>>;
struct other_base : test::tiny {
  static constexpr double rotary_base = 500000;
};
struct other_heads : test::tiny {
  static constexpr int heads = 4;
};
/// A mixer that tells nothing of itself: its weights are taken by their tensors.
struct silent : moe<test::tiny, top1<no_balance>> {
  static void describe() = delete;
};
/// A rule whose offset acts in inference too, with a scale of its own.
struct steeper : balance_rule<load_bias> {
  static constexpr double beta = 3;
};

/// Types of their own, for nvcc loses the options where it spells a template's arguments out.
using how = sinkhorn::options;
struct defaults : sinkhorn_balance<> {};
struct reference : sinkhorn_balance<how{.mode = sinkhorn::mode::reference}> {};
struct ones : sinkhorn_balance<how{.mode = sinkhorn::mode::ones}> {};
struct loose : sinkhorn_balance<how{.tolerance = 0.05}> {};
struct looser : sinkhorn_balance<how{.tolerance = 1.0 / 3}> {};
struct short_loop : sinkhorn_balance<how{.max_passes = 7}> {};
struct fixed_count : sinkhorn_balance<how{.fixed_passes = 2}> {};
struct without_newton : sinkhorn_balance<how{.newton = false}> {};
struct unit_beta : sinkhorn_balance<how{.beta = 1}> {};
struct negative_beta : sinkhorn_balance<how{.beta = -1.5}> {};
struct small_beta : sinkhorn_balance<how{.beta = 1e-5}> {};
/// A function whose name is no array of characters.
struct own_silu : activation::silu {
  static constexpr std::string_view name = "own";
};

/// How the traits of two architectures differ, as "name: first, second"; of two that differ in one.
template <class First, class Second>
std::string difference() {
  std::map<std::string, std::string> first;
  std::string out;
  First::describe([&](trait const& t) { first[t.name] = t.value; });
  Second::describe([&](trait const& t) {
    if (auto const f = first.find(t.name); f == first.end() || f->second != t.value)
      out += t.name + ": " + (f == first.end() ? "none" : f->second) + ", " + t.value +
             (t.training ? " in training" : "");
  });
  return out;
}

/// While it lives, this process' files grow to so many bytes and no further.
struct full_disk {
  explicit full_disk(std::uint64_t bytes) {
    handler = std::signal(SIGXFSZ, SIG_IGN);
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    rlimit now = before;
    now.rlim_cur = static_cast<rlim_t>(bytes);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &now) == 0);
  }
  ~full_disk() {
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
  }
  rlimit before{};
  void (*handler)(int) = nullptr;
};

}  // namespace

TEST_CASE("checkpoint: weights survive the way to a file and back, in any storage type") {
  test::temporary_file file;
  tiny_network<> net(1, make_policy()), other(2, make_policy());
  save_weights(net, file.path);
  load_weights(other, file.path);
  test::check_equal(test::weights_of(other), test::weights_of(net));
  tiny_network<bfloat16> narrow(2, make_policy());
  load_weights(narrow, file.path);
  tiny_network<double> wide(3, make_policy());
  load_weights(wide, file.path);
  test::check_close(test::download(narrow.memory().matrices()), test::download(net.memory().matrices()), 0x1p-8, "", 0);
}

TEST_CASE("checkpoint: what does not fit is named, and nothing is lost") {
  test::temporary_file file;
  tiny_network<> net(1, make_policy());
  auto const before = test::weights_of(net);
  auto const load = [&] { return test::message_of<file_error>([&] { load_weights(net, file.path); }); };

  CHECK(load() == file.path + ": can't be read");
  std::ofstream(file.path) << "abc";
  CHECK(load() == file.path + ": not a safetensors file: it has 3 bytes, expected at least 8");
  std::ofstream(file.path) << "this is not a checkpoint, but a text";
  CHECK(load().find("not a safetensors file: its header claims") != std::string::npos);

  tiny_network<float, test::tiny_mamba> mamba_only(1, make_policy());
  save_weights(mamba_only, file.path);
  CHECK(load() ==
        file.path + ": holds another model: tensor 'decoder.layers.1.mixer.router.weight': got none, expected (3, 8)");
  network<blackmamba_model<test::tiny_biased>, test_policy> biased(1, make_policy());
  save_weights(biased, file.path);
  CHECK(load() == file.path + ": holds another model: tensor 'decoder.layers.0.mixer.conv1d.weight': got (16, 2), "
                              "expected (16, 4)");

  save_weights(net, file.path);
  CHECK(test::message_of<file_error>([&] { trainer(net, test::still(4, 16)).load(file.path); }) ==
        file.path + ": holds weights without a trainer's state; load it with load_weights");
  std::filesystem::resize_file(file.path, std::filesystem::file_size(file.path) - 8);
  CHECK(load().find("it is truncated or damaged") != std::string::npos);

  // The last tensor alone is of a type that is no weight's.
  tiny_network<> other(2, make_policy());
  save_weights(other, file.path);
  std::string const name = "decoder.final_layernorm.weight";
  test::change_header(file.path, [&](std::string& h) { test::replace_after(h, "\"" + name, "F32", "I32"); });
  CHECK(load() == file.path + ": tensor '" + name + "': got dtype I32, expected F32, F64, BF16 or F16");
  test::check_equal(test::weights_of(net), before);

  CHECK(test::message_of<file_error>([&] { save_weights(net, "/no/such/folder/file"); })
            .starts_with("/no/such/folder/file: can't be written"));
}

TEST_CASE("checkpoint: an architecture tells what changes the function and no shape") {
  using base = one_moe<top1<no_balance>>;
  std::string const mixer = "decoder.layers.0.mixer.", router = mixer + "router.";
  CHECK(difference<base, one_moe<top1<no_balance>, geglu>>() == mixer + "activation: silu, gelu");
  CHECK(difference<base, one_moe<top1<no_balance>, plain_silu>>() == mixer + "gated: yes, no");
  CHECK(difference<base, one_moe<top_k<1, no_balance, gate_function::softmax>>>() == router + "gate: sigmoid, softmax");
  CHECK(difference<base, one_moe<top_k<2, no_balance, gate_function::sigmoid>>>() == router + "top_k: 1, 2");
  CHECK(difference<base, one_moe<top_k<1, no_balance, gate_function::sigmoid, 125>>>() ==
        router + "capacity_percent: 0, 125");
  CHECK(difference<base, one_moe<top1<no_balance>, hidden_activation<own_silu, true>>>() ==
        mixer + "activation: silu, own");
  CHECK(difference<one_moe<top1<sinkhorn>>, base>() ==
        router + "beta: 2, 1 in training" + router + "balance: sinkhorn, none in training");
  using plain = one_rule<defaults>;
  CHECK(difference<one_moe<top1<sinkhorn>>, plain>() == "");
  CHECK(difference<plain, one_rule<reference>>() ==
        router + "balance.mode: sound, reference in training");
  CHECK(difference<plain, one_rule<ones>>() ==
        router + "balance.mode: sound, ones in training");
  CHECK(difference<plain, one_rule<loose>>() == router + "balance.tolerance: 0, 0.05 in training");
  CHECK(difference<plain, one_rule<short_loop>>() == router + "balance.max_passes: 500, 7 in training");
  CHECK(difference<plain, one_rule<fixed_count>>() == router + "balance.fixed_passes: 0, 2 in training");
  CHECK(difference<plain, one_rule<without_newton>>() == router + "balance.newton: yes, no in training");
  CHECK(difference<plain, one_rule<unit_beta>>() == router + "beta: 2, 1 in training");
  CHECK(difference<one_moe<top1<load_bias>>, one_moe<top1<steeper>>>() == router + "beta: 1, 3");
  CHECK(difference<one_attention<test::tiny>, one_attention<other_base>>() == mixer + "rotary_base: 10000, 500000");
  CHECK(difference<one_attention<other_heads>, one_attention<test::tiny>>() ==
        mixer + "heads: 4, 2" + mixer + "kv_heads: 4, 2");
  // Named by layer: how blocks are nested is no part of it. What a piece does not tell, it does not tell.
  using layer = prenorm<rms_norm, mlp<test::tiny>>;
  CHECK(difference<language_model<test::tiny, repeat<2, layer>>, language_model<test::tiny, stack<layer, layer>>>() ==
        "");
  CHECK(difference<base, language_model<test::tiny, prenorm<rms_norm, silent>>>() == "");
}

TEST_CASE("checkpoint: an architecture's numbers are the same text in every locale") {
  std::string const router = "decoder.layers.0.mixer.router.";
  auto const check = [&] {
    CHECK(difference<one_rule<loose>, one_rule<looser>>() ==
          router + "balance.tolerance: 0.05, 0.3333333333333333 in training");
    CHECK(difference<one_rule<negative_beta>, one_rule<small_beta>>() ==
          router + "beta: -1.5, 1e-05 in training");
  };
  check();
  std::string const before = std::setlocale(LC_NUMERIC, nullptr);
  for (char const* comma : {"de_DE.UTF-8", "fr_FR.UTF-8"})  // where the system has them
    if (std::setlocale(LC_NUMERIC, comma)) check();
  std::setlocale(LC_NUMERIC, before.c_str());
}

TEST_CASE("checkpoint: weights of another architecture with the same shapes are turned away") {
  test::temporary_file const file;
  network<one_moe<top1<no_balance>>, test_policy> net(1, make_policy());
  network<one_moe<top1<no_balance>, geglu>, test_policy> other(2, make_policy());
  auto const before = test::weights_of(other);
  save_weights(net, file.path);
  std::string const head = ": of another architecture: decoder.";
  CHECK(test::message_of<file_error>([&] { load_weights(other, file.path); }) ==
        file.path + head + "layers.0.mixer.activation: got silu, expected gelu");
  test::check_equal(test::weights_of(other), before);

  // Files that tell nothing, as those from elsewhere, are taken by their tensors.
  std::string const eps = "architecture.decoder.final_layernorm.eps";
  test::change_header(file.path, [&](std::string& h) { test::replace_after(h, eps, "1e-05", "1e-06"); });
  CHECK(test::message_of<file_error>([&] { load_weights(net, file.path); }) ==
        file.path + head + "final_layernorm.eps: got 1e-06, expected 1e-05");
  test::change_header(file.path, [&](std::string& h) { test::replace_after(h, eps, "eps", "not"); });
  load_weights(net, file.path);
}

TEST_CASE("checkpoint: a write that fails leaves the old file and nothing else") {
  test::temporary_folder const folder;
  std::string const path = folder.path + "/weights";
  tiny_network<> net(1, make_policy());
  save_weights(net, path);
  auto const size = std::filesystem::file_size(path);
  {
    full_disk const disk(size / 2);
    CHECK(test::message_of<file_error>([&] { save_weights(net, path); })
              .starts_with(path + ": can't be written: "));
  }
  CHECK(folder.size() == 1);
  CHECK(std::filesystem::file_size(path) == size);
  load_weights(net, path);
}
