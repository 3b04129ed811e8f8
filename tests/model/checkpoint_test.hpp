#include "support/files.hpp"
#include "support/models.hpp"

#include <blackmamba/model/checkpoint.hpp>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <sys/resource.h>

using namespace blackmamba;

namespace {
template <class T = float, class Arch = test::tiny_blackmamba>
using tiny_network = network<Arch, test_policy, T>;

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
