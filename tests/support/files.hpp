#pragma once
#include <cstdint>
#include <filesystem>
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

}  // namespace test
