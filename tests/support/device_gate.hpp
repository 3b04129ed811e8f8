#pragma once
#include <string>

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

/// Says that the running test case wants what this machine has not; the case then returns. A program of which every
/// case that ran says so returns 77 as well.
void skip_case(std::string const& wanted);

}  // namespace test
