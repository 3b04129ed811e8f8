/// The main function of every test program: doctest's, plus three rules.
/// 1. A program that needs a device (device_gate.hpp) and finds none is skipped.
/// 2. So is one whose test cases all find that they want what the machine has not.
/// 3. A run that selects no test case, or checks nothing, fails: a test that cannot fail is none.
#define DOCTEST_CONFIG_IMPLEMENT
#include "support/device_gate.hpp"

#include <doctest/doctest.h>

#include <cstdio>

namespace test {
namespace {

char const* gate_device = nullptr;
bool (*gate_present)() = nullptr;

constexpr int skip_code = 77;

unsigned cases_run = 0, cases_skipped = 0;
bool case_skipped = false;
long long checks_done = 0;

/// Counts what ran; doctest itself calls an empty run a success.
struct run_counter : doctest::IReporter {
  explicit run_counter(doctest::ContextOptions const&) {}
  void report_query(doctest::QueryData const&) override {}
  void test_run_start() override {}
  void test_run_end(doctest::TestRunStats const& stats) override {
    cases_run = stats.numTestCasesPassingFilters;
    checks_done = static_cast<long long>(stats.numAsserts);
  }
  void test_case_start(doctest::TestCaseData const&) override { case_skipped = false; }
  void test_case_reenter(doctest::TestCaseData const&) override {}
  void test_case_end(doctest::CurrentTestCaseStats const&) override { cases_skipped += case_skipped; }
  void test_case_exception(doctest::TestCaseException const&) override {}
  void subcase_start(doctest::SubcaseSignature const&) override {}
  void subcase_end() override {}
  void log_assert(doctest::AssertData const&) override {}
  void log_message(doctest::MessageData const&) override {}
  void test_case_skipped(doctest::TestCaseData const&) override {}
};
REGISTER_LISTENER("run_counter", 1, run_counter);

}  // namespace

bool require_device(char const* device, bool (*present)()) {
  gate_device = device;
  gate_present = present;
  return true;
}

void skip_case(std::string const& wanted) {
  case_skipped = true;
  MESSAGE("skipped: no ", wanted);
}

}  // namespace test

int main(int argc, char** argv) {
  using namespace test;
  if (gate_present != nullptr && !gate_present()) {
    std::printf("skipped: no %s\n", gate_device);
    return skip_code;
  }
  doctest::Context context(argc, argv);
  int const result = context.run();
  if (context.shouldExit()) return result;
  if (cases_skipped > 0) std::printf("skipped: %u of %u test cases\n", cases_skipped, cases_run);
  if (result == 0 && cases_skipped > 0 && cases_skipped == cases_run) return skip_code;
  if (cases_run == 0 || checks_done == 0) {
    std::fprintf(stderr, "error: %u test cases and %lld checks ran; a test must check something\n", cases_run,
                 checks_done);
    return 1;
  }
  return result;
}
