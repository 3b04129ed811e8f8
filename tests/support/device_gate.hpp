#pragma once

namespace blackmamba::test {

/// Says, before main, that this program needs a device. Where `present` returns false, the program prints
/// "skipped: no <device>" and returns 77, which ctest reads as skipped; no test case runs.
///
///     inline bool const gated = require_device("CUDA device", [] { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess && n > 0; });
///
/// @returns true, so that it can initialise a variable
bool require_device(char const* device, bool (*present)());

}  // namespace blackmamba::test
