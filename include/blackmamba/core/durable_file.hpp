#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace blackmamba::detail {

/// A name beside a path that no other writer takes at this time: of this process by the count, of others on this
/// machine by the process' number.
inline std::string name_beside(std::string const& path) {
  static std::atomic<std::uint64_t> count{0};
  std::uint64_t process = 0;
#if defined(__unix__) || defined(__APPLE__)
  process = static_cast<std::uint64_t>(getpid());
#endif
  return path + ".writing-" + std::to_string(process) + "-" + std::to_string(count++);
}

/// Waits until a file's bytes, or a folder's names, are on the disk and survive a power failure. Does nothing where the
/// system is not POSIX. @returns whether it worked
inline bool reach_disk(std::string const& path) {
#if defined(__unix__) || defined(__APPLE__)
  int const file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  bool const reached = ::fsync(file) == 0;
  return ::close(file) == 0 && reached;
#else
  static_cast<void>(path);
  return true;
#endif
}

}  // namespace blackmamba::detail
