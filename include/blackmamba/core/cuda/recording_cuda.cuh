#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/recording.hpp>
#include <blackmamba/core/workspace.hpp>

#include <cuda_runtime.h>

#include <utility>

namespace blackmamba {

/// On CUDA: the first run goes kernel by kernel (libraries set themselves up, and faults show where they happen), the
/// second is captured into a graph, and every later one is one launch of that graph on the policy's stream.
template <>
class recording<device::cuda> {
 public:
  recording() = default;
  recording(recording const&) = delete;
  recording& operator=(recording const&) = delete;
  recording(recording&& other) noexcept
      : graph_(std::exchange(other.graph_, nullptr)), warm_(std::exchange(other.warm_, false)) {}
  recording& operator=(recording&& other) noexcept {
    std::swap(graph_, other.graph_);
    std::swap(warm_, other.warm_);
    return *this;
  }
  ~recording() { reset(); }

  template <class Step>
  void run(device::cuda const& policy, Step&& step) {
    if (!warm_ || cuda::synchronise_each_launch || guard_workspaces != workspace_guard::none) {
      std::forward<Step>(step)(policy);
      warm_ = true;
      return;
    }
    if (!graph_) capture(policy, std::forward<Step>(step));
    cuda::check("recording", cudaGraphLaunch(graph_, policy.stream));
  }
  void reset() {
    if (graph_) (void)cudaGraphExecDestroy(graph_);
    graph_ = nullptr;
    warm_ = false;
  }
  bool recorded() const { return graph_ != nullptr; }

 private:
  /// The default stream cannot be captured: a stream of the recording's own stands in for the policy's.
  struct own_stream {
    cudaStream_t stream = nullptr;
    own_stream() { cuda::check("recording", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    own_stream(own_stream const&) = delete;
    own_stream& operator=(own_stream const&) = delete;
    ~own_stream() { (void)cudaStreamDestroy(stream); }
  };

  template <class Step>
  void capture(device::cuda const& policy, Step&& step) {
    own_stream const capturing;
    device::cuda inner = policy;
    inner.stream = capturing.stream;
    cudaGraph_t graph = nullptr;
    cuda::check("recording", cudaStreamBeginCapture(capturing.stream, cudaStreamCaptureModeThreadLocal));
    try {
      std::forward<Step>(step)(inner);
    } catch (...) {
      if (cudaStreamEndCapture(capturing.stream, &graph) == cudaSuccess && graph) (void)cudaGraphDestroy(graph);
      (void)cudaGetLastError();
      throw;
    }
    cuda::check("recording", cudaStreamEndCapture(capturing.stream, &graph));
    cudaError_t const status = cudaGraphInstantiate(&graph_, graph, 0);
    (void)cudaGraphDestroy(graph);
    cuda::check("recording", status);
  }

  cudaGraphExec_t graph_ = nullptr;
  bool warm_ = false;
};

}  // namespace blackmamba
