#pragma once
#include <blackmamba/core/durable_file.hpp>
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// The safetensors file format: an 8-byte little-endian length, a JSON header of that length that maps names to
/// {"dtype", "shape", "data_offsets"}, then the tensors' bytes. https://github.com/huggingface/safetensors
namespace blackmamba::safetensors {

/// One tensor's line in the header. Offsets count from the end of the header.
struct tensor_info {
  std::string dtype;  ///< "F64", "F32", "F16", "BF16", "I64", "I32", "U8", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// A file's header: tensors and free-form metadata, both by name.
struct header {
  std::map<std::string, tensor_info> tensors;
  std::map<std::string, std::string> metadata;
};

/// Longer headers are refused, as the format's reference implementation does: a file of another kind would have its
/// first bytes taken for a length.
inline constexpr std::uint64_t longest_header = 100'000'000;

/// "F32" and so on for an element type.
template <class T>
constexpr char const* dtype_name() {
  if constexpr (std::is_same_v<T, float>) return "F32";
  if constexpr (std::is_same_v<T, double>) return "F64";
  if constexpr (std::is_same_v<T, bfloat16>) return "BF16";
  if constexpr (std::is_same_v<T, half>) return "F16";
  if constexpr (std::is_same_v<T, std::int64_t>) return "I64";
  if constexpr (std::is_same_v<T, std::int32_t>) return "I32";
  if constexpr (std::is_same_v<T, std::uint8_t>) return "U8";
}
/// Bytes of an element; 0 for a dtype that the format does not have.
inline std::uint64_t dtype_bytes(std::string_view dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "I8" || dtype == "U8" || dtype == "BOOL" || dtype == "F8_E4M3" || dtype == "F8_E5M2") return 1;
  return 0;
}

namespace detail {

/// The subset of JSON that a safetensors header is made of: objects of strings, of whole numbers and of arrays of
/// these. Nesting has a fixed depth, so no input can exhaust the stack.
class header_parser {
 public:
  header_parser(std::string_view text, std::string const& file) : text_(text), file_(file) {}

  header parse() {
    header h;
    object([&](std::string const& name) {
      if (name == "__metadata__") {
        object([&](std::string const& key) { h.metadata[key] = string(); });
        return;
      }
      tensor_info t;
      bool has_dtype = false, has_shape = false, has_offsets = false;
      object([&](std::string const& key) {
        if (key == "dtype") {
          t.dtype = string();
          has_dtype = true;
        } else if (key == "shape") {
          for (auto n : numbers()) t.shape.push_back(static_cast<std::int64_t>(n));
          has_shape = true;
        } else if (key == "data_offsets") {
          auto const n = numbers();
          if (n.size() != 2)
            fail("tensor '" + name + "' has " + std::to_string(n.size()) + " data_offsets, expected 2");
          t.begin = n[0];
          t.end = n[1];
          has_offsets = true;
        } else {
          fail("tensor '" + name + "' has an unknown key '" + key + "'");
        }
      });
      if (!has_dtype || !has_shape || !has_offsets) fail("tensor '" + name + "' lacks dtype, shape or data_offsets");
      if (!h.tensors.emplace(name, std::move(t)).second) fail("tensor '" + name + "' stands twice in the header");
    });
    space();
    if (at_ != text_.size()) fail("text after the header's end");
    return h;
  }

 private:
  [[noreturn]] void fail(std::string const& what) const {
    throw file_error(file_ + ": not a valid safetensors header: " + what + " (byte " + std::to_string(8 + at_) + ")");
  }
  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }
  char peek() {
    space();
    if (at_ >= text_.size()) fail("it ends too early");
    return text_[at_];
  }
  void expect(char c) {
    if (peek() != c) fail(std::string("expected '") + c + "', got '" + text_[at_] + "'");
    ++at_;
  }
  template <class Member>
  void object(Member&& member) {
    expect('{');
    if (peek() == '}') {
      ++at_;
      return;
    }
    for (;;) {
      std::string const key = string();
      expect(':');
      member(key);
      if (peek() != ',') break;
      ++at_;
    }
    expect('}');
  }
  std::vector<std::uint64_t> numbers() {
    std::vector<std::uint64_t> out;
    expect('[');
    if (peek() == ']') {
      ++at_;
      return out;
    }
    for (;;) {
      out.push_back(number());
      if (peek() != ',') break;
      ++at_;
    }
    expect(']');
    return out;
  }
  std::uint64_t number() {
    if (peek() < '0' || peek() > '9') fail("expected a whole number");
    std::uint64_t n = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      if (n > (std::uint64_t{1} << 62) / 10) fail("a number is too large");
      n = n * 10 + static_cast<std::uint64_t>(text_[at_++] - '0');
    }
    return n;
  }
  std::string string() {
    expect('"');
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) fail("a string does not end");
      char const c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        out += c;
        continue;
      }
      if (at_ >= text_.size()) fail("a string does not end");
      char const e = text_[at_++];
      switch (e) {
        case '"': case '\\': case '/': out += e; break;
        case 'n': out += '\n'; break;
        case 't': out += '\t'; break;
        case 'r': out += '\r'; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'u': escape(out); break;
        default: fail("an unknown escape in a string");
      }
    }
  }
  void escape(std::string& out) {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      if (at_ >= text_.size()) fail("a string does not end");
      char const c = text_[at_++];
      int const digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail("a bad \\u escape in a string");
      code = code * 16 + static_cast<unsigned>(digit);
    }
    if (code >= 0xd800 && code < 0xe000) fail("a surrogate in a string");
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xc0 | (code >> 6));
      out += static_cast<char>(0x80 | (code & 0x3f));
    } else {
      out += static_cast<char>(0xe0 | (code >> 12));
      out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
      out += static_cast<char>(0x80 | (code & 0x3f));
    }
  }

  std::string_view text_;
  std::string const& file_;
  std::size_t at_ = 0;
};

inline std::string quoted(std::string const& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += code;
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace detail

/// Parses and checks a header against the size of the data that follows it: known dtypes, offsets that match the
/// shapes, lie inside the data, and do not overlap. Throws file_error that names the file and the tensor.
inline header parse_header(std::string_view text, std::uint64_t data_bytes, std::string const& file) {
  header h = detail::header_parser(text, file).parse();
  std::vector<std::pair<std::uint64_t, std::pair<std::uint64_t, std::string const*>>> ranges;
  for (auto const& [name, t] : h.tensors) {
    std::uint64_t bytes = dtype_bytes(t.dtype);
    if (bytes == 0) throw file_error(file + ": tensor '" + name + "' has the unknown dtype '" + t.dtype + "'");
    if (t.begin > t.end || t.end > data_bytes)
      throw file_error(file + ": tensor '" + name + "' lies at bytes " + std::to_string(t.begin) + " to " +
                       std::to_string(t.end) + ", but the file has " + std::to_string(data_bytes) +
                       " bytes of data; it is truncated or damaged");
    for (auto extent : t.shape) {
      auto const e = static_cast<std::uint64_t>(extent);
      if (e != 0 && bytes > data_bytes / e)
        throw file_error(file + ": tensor '" + name + "' is larger than the file");
      bytes *= e;
    }
    if (t.end - t.begin != bytes)
      throw file_error(file + ": tensor '" + name + "' takes " + std::to_string(t.end - t.begin) +
                       " bytes, but its shape and dtype ask for " + std::to_string(bytes));
    if (bytes > 0) ranges.push_back({t.begin, {t.end, &name}});
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second.first)
      throw file_error(file + ": tensors '" + *ranges[i - 1].second.second + "' and '" + *ranges[i].second.second +
                       "' overlap");
  return h;
}

/// Reads a file: the header at once, tensors when asked for.
class reader {
 public:
  explicit reader(std::string path) : path_(std::move(path)), in_(path_, std::ios::binary) {
    std::error_code none;
    std::uint64_t const size = std::filesystem::file_size(path_, none);
    if (!in_ || none) throw file_error(path_ + ": can't be read");
    unsigned char length[8];
    if (size < 8 || !in_.read(reinterpret_cast<char*>(length), 8))
      throw file_error(path_ + ": not a safetensors file: it has " + std::to_string(size) +
                       " bytes, expected at least 8");
    std::uint64_t n = 0;
    for (int i = 7; i >= 0; --i) n = n << 8 | length[i];
    if (n > size - 8)
      throw file_error(path_ + ": not a safetensors file: its header claims " + std::to_string(n) +
                       " bytes, the file has " + std::to_string(size));
    if (n > longest_header)
      throw file_error(path_ + ": not a safetensors file: its header claims " + std::to_string(n) +
                       " bytes, expected at most " + std::to_string(longest_header));
    std::string text(static_cast<std::size_t>(n), '\0');
    if (!in_.read(text.data(), static_cast<std::streamsize>(n))) throw file_error(path_ + ": can't be read");
    data_ = 8 + n;
    header_ = parse_header(text, size - data_, path_);
  }

  std::string const& path() const { return path_; }
  safetensors::header const& header() const { return header_; }

  /// The tensor's line; throws file_error where there is none.
  tensor_info const& info(std::string const& name) const {
    auto const found = header_.tensors.find(name);
    if (found == header_.tensors.end()) throw file_error(path_ + ": has no tensor '" + name + "'");
    return found->second;
  }
  std::string metadata(std::string const& key) const {
    auto const found = header_.metadata.find(key);
    if (found == header_.metadata.end()) throw file_error(path_ + ": has no metadata '" + key + "'");
    return found->second;
  }
  /// The same as a number from 0 to 2^53. @throws file_error
  std::int64_t whole_number(std::string const& key) const {
    std::string const text = metadata(key);
    std::int64_t number = 0;
    bool good = !text.empty() && text.size() <= 16;
    for (char digit : text) {
      good = good && digit >= '0' && digit <= '9';
      if (good) number = number * 10 + (digit - '0');
    }
    if (!good || number > (std::int64_t{1} << 53))
      throw file_error(path_ + ": " + key + ": got '" + text + "', expected a whole number");
    return number;
  }
  /// Throws file_error unless read() takes the tensor: it is there, with so many elements of T or, where T is a
  /// floating-point type, of any of those.
  template <class T>
  void check(std::string const& name, std::int64_t count) const {
    tensor_info const& t = info(name);
    std::uint64_t const elements = (t.end - t.begin) / dtype_bytes(t.dtype);
    if (elements != static_cast<std::uint64_t>(count))
      throw file_error(path_ + ": tensor '" + name + "': got " + std::to_string(elements) + " elements, expected " +
                       std::to_string(count));
    bool const floating = t.dtype == "F32" || t.dtype == "F64" || t.dtype == "BF16" || t.dtype == "F16";
    if (t.dtype != dtype_name<T>() && !(storage<T> && floating))
      throw file_error(path_ + ": tensor '" + name + "': got dtype " + t.dtype + ", expected " +
                       (storage<T> ? "F32, F64, BF16 or F16" : dtype_name<T>()));
  }
  /// Reads the tensor, converting between floating-point types; integers must be of the same type.
  template <class T>
  void read(std::string const& name, T* to, std::int64_t count) {
    check<T>(name, count);
    tensor_info const& t = info(name);
    in_.clear();
    in_.seekg(static_cast<std::streamoff>(data_ + t.begin));
    if (t.dtype == dtype_name<T>()) {
      raw(name, to, t.end - t.begin);
      return;
    }
    if constexpr (storage<T>) {
      if (t.dtype == "F32") return converted<float>(name, to, count);
      if (t.dtype == "F64") return converted<double>(name, to, count);
      if (t.dtype == "BF16") return converted<bfloat16>(name, to, count);
      if (t.dtype == "F16") return converted<half>(name, to, count);
    }
  }

 private:
  void raw(std::string const& name, void* to, std::uint64_t bytes) {
    if (!in_.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes)))
      throw file_error(path_ + ": tensor '" + name + "' can't be read");
  }
  template <class From, class T>
  void converted(std::string const& name, T* to, std::int64_t count) {
    std::vector<From> buffer(static_cast<std::size_t>(std::min<std::int64_t>(count, 1 << 20)));
    for (std::int64_t done = 0; done < count;) {
      auto const n = std::min<std::int64_t>(count - done, static_cast<std::int64_t>(buffer.size()));
      raw(name, buffer.data(), static_cast<std::uint64_t>(n) * sizeof(From));
      for (std::int64_t i = 0; i < n; ++i) to[done + i] = convert<T>(buffer[static_cast<std::size_t>(i)]);
      done += n;
    }
  }

  std::string path_;
  std::ifstream in_;
  std::uint64_t data_ = 0;
  safetensors::header header_;
};

/// Writes a file beside its place and renames it when all of it is on the disk: an interrupted write, even by a power
/// failure, leaves the old file as it was. Of several that write one path at a time, the last to finish stays. Declare
/// every tensor, then write their bytes in that order, then finish().
class writer {
 public:
  explicit writer(std::string path) : path_(std::move(path)), beside_(blackmamba::detail::name_beside(path_)) {}
  writer(writer const&) = delete;
  writer& operator=(writer const&) = delete;
  ~writer() {
    if (!begun_) return;  // or finished
    out_.close();
    std::error_code ignored;
    std::filesystem::remove(beside_, ignored);
  }

  void metadata(std::string const& key, std::string const& value) { metadata_[key] = value; }
  template <class T>
  void declare(std::string const& name, std::vector<std::int64_t> const& shape) {
    std::uint64_t bytes = sizeof(T);
    for (auto e : shape) bytes *= static_cast<std::uint64_t>(e);
    declared_.push_back({name, {dtype_name<T>(), shape, declared_bytes_, declared_bytes_ + bytes}});
    declared_bytes_ += bytes;
  }
  template <class T>
  void write(T const* data, std::int64_t count) {
    if (!begun_) open();
    out_.write(reinterpret_cast<char const*>(data),
               static_cast<std::streamsize>(count) * static_cast<std::streamsize>(sizeof(T)));
    written_ += static_cast<std::uint64_t>(count) * sizeof(T);
  }
  void finish() {
    if (!begun_) open();
    if (written_ != declared_bytes_)
      throw file_error(path_ + ": wrote " + std::to_string(written_) + " bytes of tensors, declared " +
                       std::to_string(declared_bytes_));
    out_.close();
    std::error_code failed;
    if (!out_ || !blackmamba::detail::reach_disk(beside_)) failed = std::make_error_code(std::errc::io_error);
    if (!failed) std::filesystem::rename(beside_, path_, failed);
    if (failed) throw file_error(path_ + ": can't be written: " + failed.message());
    begun_ = false;
    // The new name too; not every file system can, and the file is complete under one name or the other.
    auto const folder = std::filesystem::path(path_).parent_path();
    blackmamba::detail::reach_disk(folder.empty() ? std::string(".") : folder.string());
  }

 private:
  void open() {
    std::string text = "{";
    if (!metadata_.empty()) {
      text += "\"__metadata__\":{";
      bool first = true;
      for (auto const& [key, value] : metadata_) {
        if (!first) text += ',';
        first = false;
        text += detail::quoted(key) + ':' + detail::quoted(value);
      }
      text += '}';
    }
    for (auto const& [name, t] : declared_) {
      if (text.size() > 1) text += ',';
      text += detail::quoted(name) + ":{\"dtype\":\"" + t.dtype + "\",\"shape\":[";
      // Appended one by one: GCC 12 warns falsely (GCC bug 105651) where a literal stands before a temporary string.
      for (std::size_t i = 0; i < t.shape.size(); ++i) {
        if (i > 0) text += ',';
        text += std::to_string(t.shape[i]);
      }
      text += "],\"data_offsets\":[";
      text += std::to_string(t.begin);
      text += ',';
      text += std::to_string(t.end);
      text += "]}";
    }
    text += '}';
    text.append((8 - text.size() % 8) % 8, ' ');  // the format aligns the data with spaces
    out_.open(beside_, std::ios::binary | std::ios::trunc);
    if (!out_) throw file_error(path_ + ": can't be written: '" + beside_ + "' can't be created");
    begun_ = true;
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(text.size() >> (8 * i));
    out_.write(reinterpret_cast<char const*>(length), 8);
    out_.write(text.data(), static_cast<std::streamsize>(text.size()));
  }

  std::string path_;
  std::string beside_;
  std::ofstream out_;
  bool begun_ = false;  // something stands beside the path
  std::map<std::string, std::string> metadata_;
  std::vector<std::pair<std::string, tensor_info>> declared_;
  std::uint64_t declared_bytes_ = 0;
  std::uint64_t written_ = 0;
};

}  // namespace blackmamba::safetensors
