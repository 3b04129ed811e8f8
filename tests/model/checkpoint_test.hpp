#include "support/files.hpp"
#include "support/models.hpp"

#include <blackmamba/model/checkpoint.hpp>

#include <filesystem>
#include <fstream>

using namespace blackmamba;

namespace {
template <class T = float, class Arch = test::tiny_blackmamba>
using tiny_network = network<Arch, test_policy, T>;
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
  test::check_equal(test::weights_of(net), before);

  CHECK(test::message_of<file_error>([&] { save_weights(net, "/no/such/folder/file"); })
            .starts_with("/no/such/folder/file: can't be written"));
}

TEST_CASE("checkpoint: a write that fails leaves the old file") {
  test::temporary_file file;
  tiny_network<> net(1, make_policy());
  save_weights(net, file.path);
  auto const size = std::filesystem::file_size(file.path);
  std::filesystem::create_directory(file.path + ".writing");  // the place beside is taken
  CHECK_THROWS_AS(save_weights(net, file.path), file_error);
  std::filesystem::remove(file.path + ".writing");
  CHECK(std::filesystem::file_size(file.path) == size);
  load_weights(net, file.path);
}
