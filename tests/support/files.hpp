#pragma once
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <unistd.h>

namespace test {

/// A file in the temporary directory that is gone at the end.
struct temporary_file {
  std::string path = (std::filesystem::temp_directory_path() /
                      ("blackmamba-test-" + std::to_string(getpid()) + "-" +
                       std::to_string(reinterpret_cast<std::uintptr_t>(this))))
                         .string();
  ~temporary_file() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
};

/// A folder in the temporary directory, empty at first, that is gone at the end with all that is in it.
struct temporary_folder {
  std::string path;
  temporary_folder() {
    temporary_file const name;
    path = name.path + "-folder";
    std::filesystem::create_directory(path);
  }
  ~temporary_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  /// Files in it.
  std::int64_t size() const {
    return std::distance(std::filesystem::directory_iterator(path), std::filesystem::directory_iterator());
  }
};

inline std::string bytes_of(std::string const& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
/// Changes the JSON header of a safetensors file; the data stays.
inline void change_header(std::string const& path, std::function<void(std::string&)> const& change) {
  std::string const file = bytes_of(path);
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(file[i]);
  std::string header = file.substr(8, static_cast<std::size_t>(length));
  change(header);
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  for (int i = 0; i < 8; ++i) out.put(static_cast<char>(header.size() >> (8 * i) & 255));
  out << header << file.substr(8 + static_cast<std::size_t>(length));
}
/// In a text, replaces the first occurrence of `from` after `behind`; neither may be missing.
inline void replace_after(std::string& text, std::string const& behind, std::string const& from,
                          std::string const& to) {
  text.replace(text.find(from, text.find(behind)), from.size(), to);  // throws where one of them is missing
}

}  // namespace test
