#pragma once
/// The version of blackmamba. This file is the one place it stands: CMake, the package files and the tests read it.

#define BLACKMAMBA_VERSION_MAJOR 0
#define BLACKMAMBA_VERSION_MINOR 1
#define BLACKMAMBA_VERSION_PATCH 0

namespace blackmamba {

/// A semantic version; ordered by major, minor, patch.
struct version_number {
  int major_part;
  int minor_part;
  int patch_part;
};

/// The version of the headers that this translation unit includes.
inline constexpr version_number version{BLACKMAMBA_VERSION_MAJOR, BLACKMAMBA_VERSION_MINOR, BLACKMAMBA_VERSION_PATCH};

}  // namespace blackmamba
