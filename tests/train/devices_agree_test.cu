#include "support/policy_cuda.hpp"

#include "support/files.hpp"
#include "support/models.hpp"

#include <blackmamba/core/cuda/memory_cuda.cuh>

using namespace blackmamba;

/// The same architectures on both devices: what training and generation compute is the same.
namespace {

constexpr std::int64_t batch_size = 4, length = 16;
training_options const learning = {
    .batch = batch_size, .length = length, .learning_rate = {.peak = 1e-2, .final = 1e-3, .warmup = 5, .steps = 200}};

/// The k-th batch of a text that has something to learn.
test::tokens batch(std::int64_t k) {
  test::tokens t(batch_size, length + 1);
  for (std::int64_t r = 0; r < batch_size; ++r)
    for (std::int64_t i = 0; i <= length; ++i)
      t(r, i) = static_cast<std::int32_t>((i * (1 + (r + k) % 3) + r + k) % 11);
  return t;
}

/// ||a - b|| / ||b||, and what is compared with zero where b is zero.
double distance(test::values const& a, test::values const& b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return size > 0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

template <class P, class View>
test::values fetch(P const& policy, View const& x) {
  using T = typename View::value_type;
  tensor<space::host, T, dyn> host(x.size());
  memory::download(policy, x, host.as_view());
  test::values v(static_cast<std::size_t>(x.size()));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<double>(widen(host.data()[i]));
  return v;
}
/// Every tensor of a memory by its name.
template <class Network, class Memory, class P>
std::vector<std::pair<std::string, test::values>> tensors_of(Memory const& memory, P const& policy) {
  std::vector<std::pair<std::string, test::values>> all;
  Network::each_tensor_of(memory, [&](entry const& e, auto const& x) {
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    if constexpr (storage<T>)
      if (x.present() && e.what != kind::buffer) all.emplace_back(e.name, fetch(policy, x));
  });
  return all;
}

/// Runs each launch by itself while it lives: nothing is recorded.
struct eagerly {
  eagerly() { blackmamba::cuda::synchronise_each_launch = true; }
  ~eagerly() { blackmamba::cuda::synchronise_each_launch = false; }
};
/// Whether a step that is run often is recorded now.
bool records() { return !blackmamba::cuda::synchronise_each_launch && !test::workspaces_guarded; }

template <int>
__global__ void do_nothing() {}

/// Whether work leaves the device's free memory as it was; asked several times, as other programs take some too.
template <class Work>
bool leaves_free_memory(Work&& work) {
  auto const available = [] {
    std::size_t bytes = 0, all = 0;
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    REQUIRE(cudaMemGetInfo(&bytes, &all) == cudaSuccess);
    return bytes;
  };
  for (int attempt = 0; attempt < 20; ++attempt) {
    auto const before = available();
    work();
    if (available() >= before) return true;
  }
  return false;
}

template <class T>
test::values trained_bits(std::int64_t steps) {
  network<test::tiny_blackmamba, device::cuda, T> net(1);
  trainer train(net, learning);
  for (std::int64_t k = 0; k < steps; ++k) train.step(batch(k));
  CHECK(train.recorded() == records());
  auto bits = fetch(net.policy(), net.memory().matrices());
  for (double x : fetch(net.policy(), net.memory().vectors())) bits.push_back(x);
  return bits;
}

}  // namespace

TEST_CASE_TEMPLATE("devices: loss and every gradient agree", Arch, test::tiny_blackmamba, test::tiny_unbalanced,
                   test::tiny_geglu, test::tiny_mamba, test::tiny_transformer, test::tiny_transformer_moe,
                   test::tiny_parallel) {
  using on_host = network<Arch, device::cpu>;
  using on_device = network<Arch, device::cuda>;
  on_host host(1);
  on_device accelerated(1);
  trainer a(host, test::still(batch_size, length));
  trainer b(accelerated, test::still(batch_size, length));
  double const expected = a.step(batch(0)).loss, actual = b.step(batch(0)).loss;
  CHECK(std::abs(actual - expected) < 1e-4 * std::abs(expected));
  CHECK(std::abs(b.evaluate(batch(1)) - a.evaluate(batch(1))) < 1e-4);
  auto const d_host = tensors_of<on_host>(a.gradient(), host.policy());
  auto const d_device = tensors_of<on_device>(b.gradient(), accelerated.policy());
  REQUIRE(d_host.size() == d_device.size());
  REQUIRE(!d_host.empty());
  for (std::size_t i = 0; i < d_host.size(); ++i) {
    INFO(d_host[i].first);
    CHECK(distance(d_device[i].second, d_host[i].second) < 1e-4);
  }
}

TEST_CASE_TEMPLATE("devices: logits agree, prompt and steps", Arch, test::tiny_blackmamba, test::tiny_geglu,
                   test::tiny_transformer) {
  network<Arch, device::cpu> host(1);
  network<Arch, device::cuda> accelerated(1);
  generator a(host, {.capacity = 64});
  generator b(accelerated, {.capacity = 64});
  std::vector<std::int32_t> const prompt = {1, 2, 3, 4, 5, 6, 7};
  a.prefill(prompt);
  b.prefill(prompt);
  CHECK(distance(test::logits_of(b), test::logits_of(a)) < 1e-4);
  for (std::int32_t t = 0; t < 10; ++t) {
    a.step({&t, 1});
    b.step({&t, 1});
    CHECK(distance(test::logits_of(b), test::logits_of(a)) < 1e-4);
  }
}

TEST_CASE("devices: 200 training steps give the same curve") {
  network<test::tiny_blackmamba, device::cpu> host(1);
  network<test::tiny_blackmamba, device::cuda> accelerated(1);
  trainer a(host, learning);
  trainer b(accelerated, learning);
  double worst = 0;
  auto const steps = static_cast<std::int64_t>(test::trials(200));
  for (std::int64_t k = 0; k < steps; ++k)
    worst = std::max(worst, std::abs(b.step(batch(k)).loss - a.step(batch(k)).loss));
  CHECK(worst < 1e-3);
}

TEST_CASE("devices: each continues the other's checkpoint") {
  test::temporary_file file;
  auto const check = [&](auto from, auto to) {
    network<test::tiny_blackmamba, decltype(from)> first(1);
    network<test::tiny_blackmamba, decltype(to)> second(99);
    trainer a(first, learning);
    trainer b(second, learning);
    for (std::int64_t k = 0; k < 20; ++k) a.step(batch(k));
    a.save(file.path);
    b.load(file.path);
    CHECK(b.step_count() == 20);
    for (std::int64_t k = 20; k < 30; ++k) CHECK(std::abs(b.step(batch(k)).loss - a.step(batch(k)).loss) < 1e-3);
  };
  check(device::cpu{}, device::cuda{});
  check(device::cuda{}, device::cpu{});
}

TEST_CASE_TEMPLATE("cuda: 50 training steps give the same bits twice, and recorded or not", T, bfloat16, float) {
  auto const steps = std::max<std::int64_t>(4, static_cast<std::int64_t>(test::trials(50)));
  auto const first = trained_bits<T>(steps);
  test::check_equal(trained_bits<T>(steps), first, "again");
  eagerly const each;
  test::check_equal(trained_bits<T>(steps), first, "launch by launch");
}

TEST_CASE_TEMPLATE("cuda: recorded decoding gives the bits of launch by launch", T, bfloat16, float) {
  network<test::tiny_blackmamba, device::cuda, T> net(1);
  auto const run = [&] {
    generator from(net);
    std::vector<std::int32_t> const prompt = {1, 2, 3};
    from.prefill(prompt);
    test::values all;
    for (std::int32_t t = 0; t < 10; ++t) {
      from.step({&t, 1});
      for (double x : test::logits_of(from)) all.push_back(x);
    }
    CHECK(from.recorded() == records());
    return all;
  };
  auto const recorded = run();
  eagerly const each;
  test::check_equal(run(), recorded);
}

TEST_CASE("cuda: a step allocates nothing on the device") {
  if (test::workspaces_guarded) return;  // those allocate each block
  network<test::tiny_blackmamba, device::cuda, bfloat16> net(1);
  trainer train(net, learning);
  generator speak(net);
  auto const before = blackmamba::cuda::device_memory();
  std::int64_t k = 0;
  auto const steps = [&] {
    for (int i = 0; i < 4; ++i, ++k) {
      train.step(batch(k));
      auto const token = static_cast<std::int32_t>(k % 3);
      speak.step({&token, 1});
    }
  };
  steps();  // records: the graphs themselves, and kernels as they are first launched, take memory of the driver's
  REQUIRE(train.recorded());
  REQUIRE(speak.recorded());
  CHECK(leaves_free_memory(steps));
  {
    eagerly const each;
    CHECK(leaves_free_memory(steps));
  }
  CHECK(blackmamba::cuda::device_memory().allocations == before.allocations);
  CHECK(before.peak >= before.current);
  CHECK(before.current > 0);
}

TEST_CASE("cuda: what does not fit is said with its size") {
  auto const message = test::message_of<workspace_error>([] { arena<space::device> huge(std::size_t{1} << 50); });
  CHECK(message.starts_with("memory: out of device memory: asked for 1125899906842624 bytes, "));
  arena<space::device> small(1024);
  CHECK(test::message_of<workspace_error>([&] { small.allocate<float>(1000); }) ==
        "workspace: asked for 4000 bytes with 0 in use, but the arena has 1024 bytes");
}

TEST_CASE("cuda: a failure names the operator") {
  auto const message = test::message_of<cuda_error>([] {
    blackmamba::cuda::launch("my_operator", device::cuda{}, {1, 2048}, do_nothing<0>);
  });
  CHECK(message.starts_with("my_operator: CUDA: invalid"));
}
