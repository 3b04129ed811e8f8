#pragma once
#include "support/support.hpp"

#include <initializer_list>
#include <utility>

namespace test {

/// Calls body(policy) with each number of threads where the policy has such a number, and else once: what the body
/// compares holds for any number of threads, and from run to run.
template <class Body, class Policy = test_policy>
void each_thread_count(std::initializer_list<int> counts, Body&& body, Policy policy = make_policy()) {
  if constexpr (requires { policy.threads; }) {
    for (int threads : counts) {
      policy.threads = threads;
      body(std::as_const(policy));
    }
  } else {
    body(std::as_const(policy));
  }
}

}  // namespace test
