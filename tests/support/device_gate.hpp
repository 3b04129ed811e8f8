#pragma once

namespace test {

/// Says, before main, that this program needs a device. Where `present` returns false, the program prints
/// "skipped: no <device>" and returns 77, which ctest reads as skipped; no test case runs.
///
///     inline bool const gated = test::require_device("CUDA device", [] {
///       int devices = 0;
///       return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
///     });
///
/// @returns true, so that it can initialise a variable
bool require_device(char const* device, bool (*present)());

}  // namespace test
