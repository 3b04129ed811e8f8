#pragma once
/// The whole library, for users. It costs seconds to compile; the library's own files include what they use.

#include <blackmamba/version.hpp>

#include <blackmamba/ops/rms_norm/rms_norm.hpp>
