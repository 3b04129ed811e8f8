#pragma once
#include "support/support.hpp"

#include <cstdint>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>

/// The operators against independent implementations, in PyTorch (golden/make_golden.py) or in plain Python
/// (golden/make_scan_golden.py), in double to 1e-10 and in float to 1e-5, relative to the largest value of each result.
namespace test::golden_files {

using namespace blackmamba;

/// The results in one file. All of them have to be asked for: a case that the test forgets is an error.
class golden {
 public:
  explicit golden(std::string const& name) : path_(folder() + "/golden/" + name + ".txt") {
    std::ifstream file(path_);
    REQUIRE_MESSAGE(file.good(), path_);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string key;
      words >> key;
      auto& numbers = results_[key];
      for (double x; words >> x;) numbers.push_back(x);
    }
  }
  ~golden() {
    for (auto const& result : results_)
      CHECK_MESSAGE(checked_.count(result.first) == 1, path_ << ": " << result.first << " was compared with nothing");
  }

  test::values const& operator[](std::string const& name) {
    checked_.insert(name);
    auto const found = results_.find(name);
    REQUIRE_MESSAGE(found != results_.end(), path_ << ": no " << name);
    return found->second;
  }
  /// Compares a result that was computed in A.
  template <class A>
  void check(std::string const& name, test::values const& actual) {
    test::check_close(actual, (*this)[name], std::is_same_v<A, double> ? 1e-10 : 1e-5, path_ + ": " + name);
  }
  template <class View>
  void check(std::string const& name, View const& view) {
    check<accum_t<typename View::value_type>>(name, test::download(view));
  }

 private:
  static std::string folder() {
#if defined(BLACKMAMBA_TEST_DATA)
    return BLACKMAMBA_TEST_DATA;
#else
    std::string const here = __FILE__;
    return here.substr(0, here.rfind("support/golden_files.hpp"));
#endif
  }
  std::string path_;
  std::map<std::string, test::values> results_;
  std::set<std::string> checked_;
};

/// The script's inputs: its hash, and offset + scale (u - 1/2) as T in the policy's memory.
inline std::uint32_t mixed(std::uint32_t i, std::uint32_t seed) {
  std::uint32_t x = i + 2654435769u * seed;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
struct range {
  double scale = 1, offset = 0;
};
inline test::values input_values(std::uint32_t seed, std::int64_t n, range r = {}) {
  test::values v;
  for (std::int64_t i = 0; i < n; ++i)
    v.push_back(r.offset + r.scale * ((mixed(static_cast<std::uint32_t>(i), seed) >> 12) * 0x1p-20 - 0.5));
  return v;
}
template <class T, class... Ints>
auto input(std::uint32_t seed, range r, Ints... extents) {
  return test::upload<T>(input_values(seed, (std::int64_t{1} * ... * extents), r), extents...);
}
template <class T, class... Ints>
auto result(Ints... extents) {
  return test::poisoned<T>(extents...);
}
/// What parameters' gradients are added to.
template <class T, class... Ints>
auto sums(Ints... extents) {
  return zeros<T>(make_policy(), extents...);
}
template <class T>
auto offsets(std::initializer_list<T> v) {
  return test::upload<std::int64_t>(test::values(v.begin(), v.end()), static_cast<std::int64_t>(v.size()));
}

inline test_policy const policy = make_policy();

}  // namespace test::golden_files
