#pragma once
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <system_error>
#include <unordered_map>

/// What is known of a text without a model: the marks that a model's bits per byte are read against.
namespace text {

/// Bits of a byte given the `order` bytes before it, by the text's own frequencies (order 0 to 2).
inline double conditional_entropy(std::string const& bytes, int order) {
  std::unordered_map<std::uint32_t, std::int64_t> context, joint;
  std::uint32_t const keep = order == 0 ? 0 : order == 1 ? 0xff : 0xffff;
  std::uint32_t history = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    auto const byte = static_cast<unsigned char>(bytes[i]);
    if (i >= static_cast<std::size_t>(order)) {
      ++context[history & keep];
      ++joint[(history & keep) << 8 | byte];
    }
    history = history << 8 | byte;
  }
  double bits = 0, total = 0;
  for (auto const& [key, n] : joint) {
    bits -= static_cast<double>(n) * std::log2(static_cast<double>(n) / static_cast<double>(context[key >> 8]));
    total += static_cast<double>(n);
  }
  return total > 0 ? bits / total : 0;
}

/// Bits per byte of `xz -9` on the text; nothing where xz is not installed.
inline std::optional<double> xz_bits_per_byte(std::string const& bytes) {
  std::error_code none;
  std::string path = (std::filesystem::temp_directory_path(none) / "blackmamba-xz-XXXXXX").string();
  if (none || path.find('\'') != std::string::npos) return {};  // it is quoted for the shell
  int const file = mkstemp(path.data());
  if (file < 0) return {};
  close(file);
  std::ofstream(path, std::ios::binary) << bytes;
  std::optional<double> bits;
  if (FILE* pipe = popen(("xz -9 -c '" + path + "' 2>/dev/null | wc -c").c_str(), "r")) {
    long long packed = 0;
    if (std::fscanf(pipe, "%lld", &packed) == 1 && packed > 0 && !bytes.empty())
      bits = 8.0 * static_cast<double>(packed) / static_cast<double>(bytes.size());
    pclose(pipe);
  }
  std::remove(path.c_str());
  return bits;
}

}  // namespace text
