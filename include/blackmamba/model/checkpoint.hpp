#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/model/network.hpp>
#include <blackmamba/model/safetensors.hpp>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace blackmamba {

namespace detail {

template <class T>
constexpr bool stored_in_checkpoint(kind k) {
  return storage<T> && k != kind::statistic;
}

/// Declares, then writes, every tensor that a memory holds, under prefix + name.
template <class Network, class Memory>
void declare_tensors(safetensors::writer& file, Memory const& memory, std::string const& prefix) {
  Network::each_tensor_of(memory, [&](entry const& e, auto const& x) {
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    if constexpr (storage<T>)
      if (x.present() && stored_in_checkpoint<T>(e.what)) file.declare<T>(prefix + e.name, e.extents);
  });
}
template <class Network, class Memory, device_policy P>
void write_tensors(safetensors::writer& file, Memory const& memory, P const& policy) {
  Network::each_tensor_of(memory, [&](entry const& e, auto const& x) {
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    if constexpr (storage<T>)
      if (x.present() && stored_in_checkpoint<T>(e.what)) {
        tensor<space::host, T, dyn> host(x.size());
        blackmamba::memory::download(policy, x, host.as_view());
        file.write(host.data(), host.size());
      }
  });
}

/// Compares a file's tensors with those that a memory expects, shapes and types; the first difference, in the model's
/// order, is the message.
template <class Network, class Memory>
void check_tensors(safetensors::reader const& file, Memory const& memory, std::string const& prefix, bool buffers_too) {
  std::map<std::string, bool> known;
  Network::each_tensor_of(memory, [&](entry const& e, auto const& x) {
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    if (!x.present() || !stored_in_checkpoint<T>(e.what)) return;
    std::string const name = prefix + e.name;
    known[name] = true;
    auto const found = file.header().tensors.find(name);
    if (found == file.header().tensors.end()) {
      if (e.what == kind::buffer && !buffers_too) return;
      throw file_error(file.path() + ": holds another model: tensor '" + name + "': got none, expected " +
                       shape_text(e.extents));
    }
    auto const& shape = found->second.shape;
    // Singleton dimensions carry no data: a convolution's weight is (D, 1, K) in published files.
    auto const essential = [](std::vector<std::int64_t> const& s) {
      std::vector<std::int64_t> out;
      for (auto n : s)
        if (n != 1) out.push_back(n);
      return out;
    };
    if (essential(shape) != essential(e.extents))
      throw file_error(file.path() + ": holds another model: tensor '" + name + "': got " + shape_text(shape) +
                       ", expected " + shape_text(e.extents));
    if constexpr (storage<T>) file.check<T>(name, x.size());
  });
  for (auto const& [name, info] : file.header().tensors)
    if (name.starts_with(prefix) && (prefix != "" || name.find('/') == std::string::npos) && !known.contains(name))
      throw file_error(file.path() + ": holds another model: tensor '" + name + "': got " + shape_text(info.shape) +
                       ", expected none");
}

/// Traits are metadata of a file, under this and their names.
inline std::string trait_key(trait const& t) { return "architecture." + t.name; }

template <class Arch, class Visitor>
void describe_architecture(Visitor&& v) {
  if constexpr (requires { Arch::describe(v); }) Arch::describe(v);
}
template <class Arch>
void write_traits(safetensors::writer& file, bool training) {
  describe_architecture<Arch>([&](trait const& t) {
    if (training || !t.training) file.metadata(trait_key(t), t.value);
  });
}
/// Compares a file's traits with the architecture's; the first difference, in the model's order, is the message. What a
/// file does not tell, one from elsewhere for instance, passes.
template <class Arch>
void check_traits(safetensors::reader const& file, bool training) {
  describe_architecture<Arch>([&](trait const& t) {
    auto const found = file.header().metadata.find(trait_key(t));
    if (found == file.header().metadata.end() || found->second == t.value || (t.training && !training)) return;
    throw file_error(file.path() + ": of another architecture: " + t.name + ": got " + found->second + ", expected " +
                     t.value);
  });
}

/// A file's tensors for a memory, in host memory: read, and converted to the memory's types, in whole before the first
/// is written, so that a file that can't be read changes nothing.
template <class Network, class Memory>
class staged_tensors {
 public:
  staged_tensors(safetensors::reader& file, Memory const& memory, std::string const& prefix) : memory_(memory) {
    Network::each_tensor_of(memory, [&](entry const& e, auto const& x) {
      using T = typename std::remove_cvref_t<decltype(x)>::value_type;
      if constexpr (storage<T>)
        if (x.present() && stored_in_checkpoint<T>(e.what) && file.header().tensors.contains(prefix + e.name)) {
          bytes host(x.size() * static_cast<std::int64_t>(sizeof(T)));
          file.read(prefix + e.name, reinterpret_cast<T*>(host.data()), x.size());
          tensors_.emplace(e.name, std::move(host));
        }
    });
  }
  /// Writes them to the memory.
  template <device_policy P>
  void upload(P const& policy) const {
    Network::each_tensor_of(memory_, [&](entry const& e, auto const& x) {
      using T = typename std::remove_cvref_t<decltype(x)>::value_type;
      if constexpr (storage<T>)
        if (auto const found = tensors_.find(e.name); found != tensors_.end())
          blackmamba::memory::upload(
              policy, view<space::host, T const, dyn>(reinterpret_cast<T const*>(found->second.data()), x.size()), x);
    });
  }

 private:
  using bytes = tensor<space::host, unsigned char, dyn>;
  Memory const& memory_;
  std::map<std::string, bytes> tensors_;
};

}  // namespace detail

/// Writes a network's weights (and balance offsets) in its storage type, under the published names, and as metadata
/// what the architecture is beside its tensors (see trait). The file appears whole or not at all. @throws file_error
template <class Network>
void save_weights(Network const& network, std::string const& path) {
  safetensors::writer file(path);
  file.metadata("format", "blackmamba weights 1");
  detail::write_traits<typename Network::arch>(file, false);
  detail::declare_tensors<Network>(file, network.memory(), "");
  detail::write_tensors<Network>(file, network.memory(), network.policy());
  file.finish();
}

/// Reads weights of any floating-point type into a network's storage type. Every tensor must be there with the
/// network's shape, and no other; tensors named "…/…" (a trainer's state) are passed over. A file that says what its
/// architecture is must say this one's: SwiGLU weights do not load into GEGLU layers, though their shapes agree. A file
/// without that, published weights for instance, is taken by its tensors alone. A trainer of the network goes on from
/// the new weights with the moments that it has.
///
/// The file is checked and read in whole, into as much host memory as the weights take, before the first weight
/// changes: where file_error or workspace_error is thrown, the network is as it was.
/// @throws file_error naming the first tensor or trait that differs, got and expected
template <class Network>
void load_weights(Network& network, std::string const& path) {
  safetensors::reader file(path);
  detail::check_tensors<Network>(file, network.memory(), "", false);
  detail::check_traits<typename Network::arch>(file, false);
  detail::staged_tensors<Network, typename Network::memory_type> const staged(file, network.memory(), "");
  network.weights_changed();
  staged.upload(network.policy());
}

}  // namespace blackmamba
