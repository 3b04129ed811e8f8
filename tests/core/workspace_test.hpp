#include "support/support.hpp"

#include <blackmamba/core/workspace.hpp>

using namespace blackmamba;

namespace {
using test_arena = arena<test::test_space>;
}

TEST_CASE("workspace: blocks are aligned, follow each other and have their shape") {
  test_arena memory(4096);
  auto const a = memory.allocate<float>(3, 5);
  auto const b = memory.allocate<double>(7);
  CHECK(a.extents() == std::array<std::int64_t, 2>{3, 5});
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 256 == 0);
  if (!test::workspaces_guarded)
    CHECK(reinterpret_cast<std::uintptr_t>(b.data()) - reinterpret_cast<std::uintptr_t>(a.data()) == 256);
  CHECK(memory.used() == 512);
  CHECK(memory.peak() == 512);
  CHECK(memory.capacity() == 4096);
  auto const none = memory.allocate<float>(0, 9);
  CHECK(none.size() == 0);
  CHECK(memory.used() == 512);
}
TEST_CASE("workspace: exhaustion names what was asked, what is in use and the size") {
  test_arena memory(1024);
  memory.allocate<char>(700);
  CHECK(test::message_of<workspace_error>([&] { memory.allocate<float>(100); }) ==
        "workspace: asked for 400 bytes with 768 in use, but the arena has 1024 bytes");
  CHECK(memory.used() == 768);  // unchanged: what fits still does
  CHECK_NOTHROW(memory.allocate<float>(64));
  CHECK(memory.used() == 1024);
}
TEST_CASE("workspace: scopes give back what they took") {
  test_arena memory(4096);
  test_policy policy = make_policy();
  policy.workspace = &memory;
  {
    scratch<test_policy> outer(policy, 0);
    auto const kept = outer.allocate<float>(10);
    {
      scratch<test_policy> inner(policy, 0);
      auto const more = inner.allocate<float>(100);
      CHECK(more.data() != kept.data());
      CHECK(memory.used() == 768);
    }
    CHECK(memory.used() == 256);
    auto const again = outer.allocate<float>(100);
    if (!test::workspaces_guarded)
      CHECK(reinterpret_cast<std::uintptr_t>(again.data()) - reinterpret_cast<std::uintptr_t>(kept.data()) == 256);
  }
  CHECK(memory.used() == 0);
  CHECK(memory.peak() == 768);
}
TEST_CASE("workspace: without one, a scope owns what scratch_sum says") {
  auto const bytes = scratch_sum(40, 257, std::size_t{0});
  CHECK(bytes == 256 + 512);
  CHECK(scratch_sum() == 0);
  scratch<test_policy> own(make_policy(), bytes);
  CHECK_NOTHROW(own.allocate<float>(10));
  CHECK_NOTHROW(own.allocate<char>(257));
  CHECK(test::message_of<workspace_error>([&] { own.allocate<char>(1); }) ==
        "workspace: asked for 1 bytes with 768 in use, but the arena has 768 bytes");
}
TEST_CASE("workspace: a measuring arena counts under the dry policy, and its peak is enough") {
  static_assert(is_dry<device::dry<test_policy>> && !is_dry<test_policy>);
  auto measure = test_arena::measuring();
  auto const step = [](auto const& policy) {
    using P = std::remove_cvref_t<decltype(policy)>;
    scratch<P> outer(policy, 0);
    outer.template allocate<double>(100);
    {
      scratch<P> inner(policy, 0);
      inner.template allocate<char>(3, 1000);
    }
    scratch<P> inner(policy, 0);
    inner.template allocate<char>(10);
  };
  step(device::dry<test_policy>{&measure});
  CHECK(measure.peak() == 1024 + 3072);
  CHECK(measure.used() == 0);
  CHECK(measure.capacity() == 0);
  CHECK(measure.allocate<float>(3).present());  // absence would mean something else

  test_policy policy = make_policy();
  test_arena enough(measure.peak()), short_of_one(measure.peak() - 1);
  policy.workspace = &enough;
  CHECK_NOTHROW(step(policy));
  policy.workspace = &short_of_one;
  CHECK_THROWS_AS(step(policy), workspace_error);
}
TEST_CASE("workspace: arenas move") {
  test_arena a(512);
  auto const block = a.allocate<float>(4);
  test_arena b(std::move(a));
  CHECK(b.used() == 256);
  CHECK(b.capacity() == 512);
  CHECK(a.capacity() == 0);
  test_arena c(256);
  c = std::move(b);
  CHECK(c.capacity() == 512);
  c.release_to(0);
  if (!test::workspaces_guarded) CHECK(c.allocate<float>(4).data() == block.data());
}
TEST_CASE("workspace: an arena over memory of another owner leaves it there") {
  test_arena owner(1024);
  auto const memory = owner.allocate<char>(1024);
  {
    auto borrower = test_arena::borrowing(memory.data(), 512);
    void* const first = borrower.allocate<float>(4).data();
    if (!test::workspaces_guarded) CHECK(first == static_cast<void*>(memory.data()));
    CHECK(borrower.capacity() == 512);
    CHECK_THROWS_AS(borrower.allocate<char>(512), workspace_error);
    auto const moved = std::move(borrower);
    CHECK(moved.capacity() == 512);
  }
  auto const zero = test::upload<char>(test::values(1024), 1024);
  memory::copy(make_policy(), zero.as_view(), memory);  // the memory is still the owner's
  CHECK(test::download(memory)[0] == 0);
}

namespace {
/// Guards the workspaces that are made while it lives.
struct guarding {
  workspace_guard const before = std::exchange(guard_workspaces, workspace_guard::band);
  ~guarding() { guard_workspaces = before; }
};
}  // namespace

TEST_CASE("workspace: a guarded one finds what was written past a block, and counts as without guards") {
  guarding const on;
  test_arena memory(1024);
  auto const first = memory.allocate<std::uint8_t>(300);
  auto const second = memory.allocate<std::uint8_t>(10);
  CHECK(memory.used() == 768);
  CHECK(test::download(first) == test::values(300, 255));  // poisoned
  CHECK(test::message_of<workspace_error>([&] { memory.allocate<char>(257); }) ==
        "workspace: asked for 257 bytes with 768 in use, but the arena has 1024 bytes");
  CHECK(memory.damage() == "");
  auto const write = [&](view<test::test_space, std::uint8_t, dyn> to, int value) {
    std::vector<std::uint8_t> const bytes(static_cast<std::size_t>(to.size()), static_cast<std::uint8_t>(value));
    memory::upload(make_policy(), host_view<std::uint8_t const, dyn>(bytes.data(), to.size()), to);
  };
  write(first, 7);
  write(second, 7);
  CHECK(memory.damage() == "");
  view<test::test_space, std::uint8_t, dyn> const past(second.data() + 12, 1);
  write(past, 7);
  CHECK(memory.damage() == "workspace: a block of 10 bytes at 512 was written past its end, at byte 12");
  write(past, 255);
  CHECK(memory.damage() == "");
  memory.release_to(512);
  CHECK(memory.used() == 512);
  CHECK(test::download(first) == test::values(300, 7));
}
