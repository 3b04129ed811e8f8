#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/nn/module.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace blackmamba {

namespace detail {

/// Binds a described view to memory at `base` and moves `used`, in elements of the memory, on to the next multiple of
/// 128: offsets are the same in the memories of weights, gradients and moments, whatever their types.
template <class View, class T>
void bind_view(View& v, entry const& e, T* base, std::int64_t& used) {
  using element = typename View::element_type;
  typename View::shape_type shape{};
  check_that(static_cast<int>(e.extents.size()) == View::rank, "network", e.name, std::to_string(e.extents.size()),
             std::to_string(View::rank) + " dimensions");
  for (std::size_t i = 0; i < shape.size(); ++i) shape[i] = e.extents[i];
  // A null base measures: views get their shape and stay absent.
  v = View(base ? reinterpret_cast<element*>(base + used) : nullptr, shape);
  constexpr auto from = static_cast<std::int64_t>(sizeof(element)), to = static_cast<std::int64_t>(sizeof(T));
  std::int64_t const elements = (e.size() * from + to - 1) / to;
  used += (elements + 127) / 128 * 128;
}

}  // namespace detail

/// The parameters of an architecture in one run of memory for each kind, in the order of the architecture's visit.
/// Padding between tensors is zero and stays zero under any update that maps zero to zero. Where T is its own
/// accumulation type, vectors follow the matrices without a gap: flat() is both.
template <class Arch, class Space, storage T>
class parameter_memory {
 public:
  using accum = accum_t<T>;
  using views_type = typename Arch::template parameters<Space, T>;

  parameter_memory() = default;
  /// @param trainable_only leaves buffers and statistics out: for gradients
  template <device_policy P>
  explicit parameter_memory(P const& policy, bool trainable_only = false) {
    constexpr bool one_run = std::is_same_v<T, accum>;
    sizes const size = bind({});
    matrices_ = zeros<T>(policy, size.matrices + (one_run ? size.vectors : 0));
    matrix_count_ = size.matrices;
    if constexpr (!one_run) vectors_ = zeros<accum>(policy, size.vectors);
    vector_count_ = size.vectors;
    if (!trainable_only) {
      buffers_ = zeros<accum>(policy, size.buffers);
      statistics_ = zeros<std::int64_t>(policy, size.statistics);
    }
    bind({matrices_.data(), vectors().data(), buffers_.data(), statistics_.data()});
  }

  views_type const& views() const { return views_; }
  /// Calls v(entry, view) for every tensor; kinds that are left out come as absent views.
  template <class Visitor>
  void visit(Visitor&& v) const {
    auto copy = views_;
    Arch::visit(copy, v);
  }

  view<Space, T, dyn> matrices() const { return matrices_.slice(0, matrix_count_); }
  view<Space, accum, dyn> vectors() const {
    if constexpr (std::is_same_v<T, accum>)
      return matrices_.slice(matrix_count_, vector_count_);
    else
      return vectors_;
  }
  view<Space, accum, dyn> buffers() const { return buffers_; }
  /// Matrices and vectors.
  view<Space, T, dyn> flat() const
    requires std::is_same_v<T, accum>
  {
    return matrices_;
  }

 private:
  struct bases {
    T* matrices = nullptr;
    accum* vectors = nullptr;
    accum* buffers = nullptr;
    std::int64_t* statistics = nullptr;
  };
  struct sizes {
    std::int64_t matrices = 0, vectors = 0, buffers = 0, statistics = 0;
  };
  sizes bind(bases const& at) {
    sizes used;
    Arch::visit(views_, [&](entry const& e, auto& v) {
      switch (e.what) {
        case kind::matrix: detail::bind_view(v, e, at.matrices, used.matrices); break;
        case kind::vector: detail::bind_view(v, e, at.vectors, used.vectors); break;
        case kind::buffer: detail::bind_view(v, e, at.buffers, used.buffers); break;
        case kind::statistic: detail::bind_view(v, e, at.statistics, used.statistics); break;
      }
    });
    return used;
  }

  tensor<Space, T, dyn> matrices_;
  tensor<Space, accum, dyn> vectors_;
  tensor<Space, accum, dyn> buffers_;
  tensor<Space, std::int64_t, dyn> statistics_;
  std::int64_t matrix_count_ = 0;
  std::int64_t vector_count_ = 0;
  views_type views_{};
};

/// Numbers of parameters: all, and those that take part in the computation of one token (embedding included).
struct parameter_count {
  std::int64_t total = 0;
  std::int64_t active = 0;
  int tensors = 0;  ///< as a checkpoint counts them, an expert's weights one by one
  int layers = 0;
};
template <class Arch>
parameter_count count_parameters() {
  parameter_count count;
  typename Arch::template parameters<space::host, float> views{};
  Arch::visit(views, [&](entry const& e, auto const&) {
    if (e.what != kind::matrix && e.what != kind::vector) return;
    count.total += e.size();
    count.active += static_cast<std::int64_t>(std::llround(static_cast<double>(e.size()) * e.active));
    count.tensors += e.name.find("{e}") == std::string::npos ? 1 : static_cast<int>(e.extents[0]);
  });
  count.layers = Arch::layer_count();
  return count;
}

namespace detail {

/// FNV-1a: the random stream of a parameter is that of its name, whatever stands around it.
constexpr std::uint64_t name_hash(std::string_view name) {
  std::uint64_t h = 14695981039346656037u;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return h;
}

template <class T>
void fill_initial(entry const& e, std::uint64_t seed, int layers, host_view<T, dyn> x) {
  philox const random(seed, name_hash(e.name));
  double const scale = e.start.scaled_by_depth ? 1 / std::sqrt(static_cast<double>(std::max(layers, 1))) : 1.0;
  std::int64_t const last = e.extents.empty() ? 1 : e.extents.back();
  for (std::int64_t i = 0; i < x.size(); ++i) {
    auto const n = static_cast<std::uint64_t>(i);
    double value = 0;
    switch (e.start.kind) {
      case initial::rule::constant: value = e.start.a; break;
      case initial::rule::uniform: value = e.start.a * (2 * static_cast<double>(random.uniform(n)) - 1); break;
      case initial::rule::normal: value = e.start.a * static_cast<double>(random.normal(n)); break;
      case initial::rule::log_index: value = std::log(static_cast<double>(i % last + 1)); break;
      case initial::rule::inverse_softplus: {
        double const low = std::log(e.start.a), high = std::log(e.start.b);
        double const dt = std::max(std::exp(low + (high - low) * static_cast<double>(random.uniform(n))), 1e-4);
        value = dt + std::log(-std::expm1(-dt));
        break;
      }
    }
    x.data()[i] = convert<T>(value * scale);
  }
}

}  // namespace detail

/// Whether a type is a whole model, as language_model is.
template <class Arch>
concept architecture = requires(typename Arch::template parameters<space::host, float> p) {
  Arch::visit(p, detail::ignore_visits{});
  { Arch::layer_count() } -> std::convertible_to<int>;
};

/// An architecture with memory: parameters on the policy's device, stored as T, initialised from the seed.
template <class Arch, device_policy P, storage T = float>
class network {
  static_assert(architecture<Arch>, "blackmamba: network: the first argument is no architecture; blocks become one as "
                                    "language_model<Config, Blocks>");

 public:
  using arch = Arch;
  using policy_type = P;
  using storage_type = T;
  using space_type = typename P::memory_space;
  using memory_type = parameter_memory<Arch, space_type, T>;
  using parameters_type = typename memory_type::views_type;

  explicit network(std::uint64_t seed, P policy = {}) : policy_(policy), seed_(seed), memory_(policy) { initialise(); }

  P const& policy() const { return policy_; }
  std::uint64_t seed() const { return seed_; }
  parameters_type const& parameters() const { return memory_.views(); }
  memory_type const& memory() const { return memory_; }
  /// A number that is another one after every change of the weights that was told of. Who keeps something that follows
  /// from the weights, as a trainer keeps fp32 masters of 16-bit weights, sees by it that they are not those any more.
  std::uint64_t version() const { return version_; }
  /// Tells of a change. load_weights and trainers do; whoever writes to the weights through views calls it afterwards.
  void weights_changed() { ++version_; }

  /// Calls v(entry, contiguous view) for every tensor as a checkpoint names it: an expert's weights one by one.
  template <class Visitor>
  void each_tensor(Visitor&& v) const {
    each_tensor_of(memory_, v);
  }
  template <class Memory, class Visitor>
  static void each_tensor_of(Memory const& memory, Visitor&& v) {
    memory.visit([&](entry const& e, auto const& x) {
      auto const at = e.name.find("{e}");
      if (at == std::string::npos) {
        v(e, x);
      } else if constexpr (std::remove_reference_t<decltype(x)>::rank >= 2) {
        for (std::int64_t i = 0; i < e.extents[0]; ++i) {
          entry one = e;
          one.name.replace(at, 3, std::to_string(i));
          one.extents.erase(one.extents.begin());
          std::int64_t const n = one.size();
          v(one, x.present() ? x.reshape(e.extents[0], n).slice(i, 1).reshape(n)
                             : decltype(x.reshape(n)){});
        }
      }
    });
  }

 private:
  void initialise() {
    int const layers = count_parameters<Arch>().layers;
    memory_.visit([&](entry const& e, auto& x) {
      using element = typename std::remove_reference_t<decltype(x)>::value_type;
      if constexpr (storage<element>) {
        tensor<space::host, element, dyn> host(x.size());
        detail::fill_initial(e, seed_, layers, host.as_view());
        blackmamba::memory::upload(policy_, host.as_view(), x);
      }
    });
  }

  P policy_;
  std::uint64_t seed_;
  std::uint64_t version_ = 0;
  memory_type memory_;
};

}  // namespace blackmamba
