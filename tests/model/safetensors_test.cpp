#include "support/files.hpp"
#include "support/policy_cpu.hpp"
#include "support/support.hpp"

#include <blackmamba/model/safetensors.hpp>

#include <filesystem>
#include <fstream>
#include <vector>

using namespace blackmamba;

namespace {

std::string parse(std::string const& header, std::uint64_t bytes) {
  return test::message_of<file_error>([&] { safetensors::parse_header(header, bytes, "f"); });
}

}  // namespace

TEST_CASE("safetensors: what is written is read") {
  test::temporary_file const place;
  std::string const& path = place.path;
  std::vector<float> const a = {1, -2, 3.5f, 0, 1e30f, -1e-30f};
  std::vector<std::int64_t> const b = {-7, std::int64_t{1} << 40};
  {
    safetensors::writer file(path);
    file.metadata("note \"quoted\"", "line\nbreak \\");
    file.declare<float>("a", {2, 3});
    file.declare<std::int64_t>("b", {2});
    file.declare<float>("empty", {0, 3});
    file.write(a.data(), 6);
    file.write(b.data(), 2);
    file.finish();
  }
  safetensors::reader file(path);
  CHECK(file.metadata("note \"quoted\"") == "line\nbreak \\");
  CHECK(file.info("a").shape == std::vector<std::int64_t>{2, 3});
  CHECK(file.info("a").dtype == "F32");
  CHECK(file.info("empty").shape == std::vector<std::int64_t>{0, 3});
  std::vector<float> a_again(6);
  std::vector<std::int64_t> b_again(2);
  file.read("b", b_again.data(), 2);
  file.read("a", a_again.data(), 6);
  CHECK(a_again == a);
  CHECK(b_again == b);
  std::vector<double> wide(6);
  file.read("a", wide.data(), 6);
  CHECK(wide[2] == 3.5);
  std::vector<bfloat16> narrow(6);
  file.read("a", narrow.data(), 6);
  CHECK(static_cast<float>(narrow[1]) == -2.0f);
}

TEST_CASE("safetensors: the data starts at a multiple of 8 bytes, as the format asks") {
  test::temporary_file const place;
  std::string const& path = place.path;
  for (int n = 1; n < 12; ++n) {
    {
      safetensors::writer file(path);
      file.declare<float>(std::string(static_cast<std::size_t>(n), 'n'), {1});
      float const x = 1;
      file.write(&x, 1);
      file.finish();
    }
    CHECK((std::filesystem::file_size(path) - 4) % 8 == 0);
  }
}

TEST_CASE("safetensors: a file that is not finished does not appear") {
  test::temporary_folder const folder;
  std::string const path = folder.path + "/file";
  {
    safetensors::writer file(path);
    file.declare<float>("a", {2});
    float const x = 1;
    file.write(&x, 1);
    CHECK(folder.size() == 1);  // beside its place
    CHECK(!std::filesystem::exists(path));
    CHECK(test::message_of<file_error>([&] { file.finish(); }) == path + ": wrote 4 bytes of tensors, declared 8");
  }
  CHECK(folder.size() == 0);
}

TEST_CASE("safetensors: of two that write one path at a time the last to finish stays, whole") {
  test::temporary_folder const folder;
  std::string const path = folder.path + "/file";
  std::vector<float> const numbers = {1, 2}, others = {3, 4};
  safetensors::writer first(path), second(path);
  for (auto* file : {&first, &second}) file->declare<float>("a", {2});
  first.write(numbers.data(), 2);
  second.write(others.data(), 1);
  first.finish();
  second.write(others.data() + 1, 1);
  std::vector<float> found(2);
  safetensors::reader(path).read("a", found.data(), 2);
  CHECK(found == numbers);
  second.finish();
  safetensors::reader(path).read("a", found.data(), 2);
  CHECK(found == others);
  CHECK(folder.size() == 1);
}

TEST_CASE("safetensors: a large file of another kind is refused before its first bytes are taken for a length") {
  test::temporary_file const place;
  std::uint64_t const length = 100'000'001;
  std::ofstream out(place.path, std::ios::binary);
  for (int i = 0; i < 8; ++i) out.put(static_cast<char>(length >> (8 * i) & 255));
  out.close();
  std::filesystem::resize_file(place.path, 8 + length);  // takes no space
  CHECK(test::message_of<file_error>([&] { safetensors::reader file(place.path); }) ==
        place.path + ": not a safetensors file: its header claims 100000001 bytes, expected at most 100000000");
}

TEST_CASE("safetensors: damaged headers are named") {
  auto const good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  CHECK(safetensors::parse_header(good, 8, "f").tensors.size() == 1);
  CHECK(safetensors::parse_header("{}  ", 0, "f").tensors.empty());
  CHECK(safetensors::parse_header(R"({"\u00e9":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", 1, "f")
            .tensors.contains("\xc3\xa9"));

  CHECK(parse("", 0).find("it ends too early") != std::string::npos);
  CHECK(parse("{", 0).find("it ends too early") != std::string::npos);
  CHECK(parse("[]", 0).find("expected '{', got '['") != std::string::npos);
  CHECK(parse("{} x", 0).find("text after the header's end") != std::string::npos);
  CHECK(parse(good, 7).find("truncated or damaged") != std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}})", 8) ==
        "f: tensor 'a' has the unknown dtype 'F33'");
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8) ==
        "f: tensor 'a' is larger than the file");
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8) ==
        "f: tensor 'a' takes 8 bytes, but its shape and dtype ask for 4");
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,8]}})", 8).find("larger") !=
        std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}})", 8)
            .find("a number is too large") != std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}})", 8).find("whole number") !=
        std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8).find("lies at bytes") !=
        std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[2]}})", 8).find("lacks dtype, shape or data_offsets") !=
        std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8).find("1 data_offsets") !=
        std::string::npos);
  CHECK(parse(R"({"a":{"dtype":"F32","shape":[2],"size":1}})", 8).find("unknown key 'size'") != std::string::npos);
  std::string const a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  CHECK(parse("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12) ==
        "f: tensors 'a' and 'b' overlap");
  CHECK(parse("{" + a + "," + a + "}", 16).find("tensor 'a' stands twice") != std::string::npos);
  CHECK(parse("{\"a\n\":1}", 8).find("control character") != std::string::npos);
}

TEST_CASE("safetensors: no prefix or single-byte change of a header does more than throw") {
  std::string const good =
      R"({"__metadata__":{"k":"v\n"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}})";
  int thrown = 0, read = 0;
  auto const attempt = [&](std::string const& text) {
    try {
      safetensors::parse_header(text, 10, "f");
      ++read;
    } catch (file_error const&) {
      ++thrown;
    }
  };
  for (std::size_t n = 0; n < good.size(); ++n) attempt(good.substr(0, n));
  CHECK(read == 0);
  for (std::size_t i = 0; i < good.size(); ++i)
    for (int byte = 0; byte < 256; ++byte) {
      std::string changed = good;
      changed[i] = static_cast<char>(byte);
      attempt(changed);
    }
  CHECK(thrown > 10000);
}
