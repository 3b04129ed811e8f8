#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cublasLt.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>

/// Dense products by cuBLASLt: the one place that knows the library.
namespace blackmamba::cuda::detail {

inline void check_library(char const* op, cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw cuda_error(std::string(op) + ": cuBLASLt: " + cublasLtGetStatusString(status));
}

template <class T>
constexpr cudaDataType_t library_type() {
  if constexpr (std::is_same_v<T, float>) return CUDA_R_32F;
  if constexpr (std::is_same_v<T, double>) return CUDA_R_64F;
  if constexpr (std::is_same_v<T, bfloat16>) return CUDA_R_16BF;
  if constexpr (std::is_same_v<T, half>) return CUDA_R_16F;
}

/// A product without types.
struct library_request {
  cudaDataType_t operands, result;
  transpose ta, tb;
  std::int64_t m, n, k, lda, ldb, ldc;
  void const* a;
  void const* b;
  void* c;
  bool accumulate;
  void const* bias;
  void* workspace;
  std::size_t workspace_bytes;
};

/// Handles, and what the library's heuristic chose for each product seen so far: by shape, types, layout, alignment and
/// device. A known product costs a look-up.
class gemm_library {
 public:
  static gemm_library& instance() {
    // Never destroyed: the context may be gone by then.
    static auto* const library = new gemm_library;
    return *library;
  }

  /// Enqueues the product. False where the library has no algorithm for it. @throws cuda_error naming the operator
  bool run(char const* op, cudaStream_t stream, library_request const& x) {
    plan p;
    {
      std::lock_guard const lock(mutex_);
      auto const key = key_of(op, x);
      auto found = plans_.find(key);
      if (found == plans_.end()) {
        if (plans_.size() >= most_plans) plans_.clear();
        found = plans_.emplace(key, make_plan(op, x)).first;
      }
      p = found->second;
    }
    if (!p.possible) return false;
    if (x.bias)
      check_library(op, cublasLtMatmulDescSetAttribute(&p.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &x.bias,
                                                       sizeof(x.bias)));
    double const alpha_double = 1, beta_double = x.accumulate ? 1 : 0;
    float const alpha_float = 1, beta_float = x.accumulate ? 1 : 0;
    bool const wide = x.operands == CUDA_R_64F;
    void const* const alpha = wide ? static_cast<void const*>(&alpha_double) : &alpha_float;
    void const* const beta = wide ? static_cast<void const*>(&beta_double) : &beta_float;
    // Row-major C = A B is column-major C^T = B^T A^T.
    check_library(op, cublasLtMatmul(p.handle, &p.description, alpha, x.b, &p.left, x.a, &p.right, beta, x.c, &p.result,
                                     x.c, &p.result, &p.algorithm, x.workspace, x.workspace_bytes, stream));
    return true;
  }

 private:
  /// Shapes may differ from call to call: what is kept of them is bounded. Where there are more, all are made again.
  static constexpr std::size_t most_plans = 1024;
  using plan_key = std::array<std::int64_t, 14>;
  struct hash {
    std::size_t operator()(plan_key const& key) const {
      std::uint64_t h = 0xcbf29ce484222325u;
      for (auto word : key) h = (h ^ static_cast<std::uint64_t>(word)) * 0x9e3779b97f4a7c15u ^ (h >> 29);
      return static_cast<std::size_t>(h);
    }
  };
  struct plan {
    bool possible = false;
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDescOpaque_t description;
    cublasLtMatrixLayoutOpaque_t left, right, result;
    cublasLtMatmulAlgo_t algorithm;
  };

  gemm_library() = default;

  static std::uint32_t alignment_of(void const* p) {
    auto const address = reinterpret_cast<std::uintptr_t>(p);
    for (std::uint32_t bytes : {256u, 16u, 8u, 4u})
      if (address % bytes == 0) return bytes;
    return 2;
  }
  static plan_key key_of(char const* op, library_request const& x) {
    int device = 0;
    check(op, cudaGetDevice(&device));
    auto const flags = static_cast<std::int64_t>(x.ta) | static_cast<std::int64_t>(x.tb) << 1 |
                       std::int64_t{x.accumulate} << 2 | std::int64_t{x.bias != nullptr} << 3;
    return {device,
            x.operands,
            x.result,
            flags,
            x.m,
            x.n,
            x.k,
            x.lda,
            x.ldb,
            x.ldc,
            alignment_of(x.a),
            alignment_of(x.b),
            alignment_of(x.c),
            static_cast<std::int64_t>(x.workspace_bytes)};
  }

  cublasLtHandle_t handle_of(char const* op, int device) {
    auto& handle = handles_[device];
    if (!handle) check_library(op, cublasLtCreate(&handle));
    return handle;
  }

  plan make_plan(char const* op, library_request const& x) {
    int device = 0;
    check(op, cudaGetDevice(&device));
    plan p;
    p.handle = handle_of(op, device);
    bool const wide = x.operands == CUDA_R_64F;
    auto const set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
      check_library(op, cublasLtMatmulDescSetAttribute(&p.description, attribute, &value, sizeof(value)));
    };
    check_library(op, cublasLtMatmulDescInit(&p.description, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                             wide ? CUDA_R_64F : CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, x.tb == transpose::yes ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, x.ta == transpose::yes ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (x.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, x.bias);
    }
    auto const layout = [&](cublasLtMatrixLayoutOpaque_t& to, cudaDataType_t type, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride) {
      if (rows == 1 && stride < columns) stride = columns;  // the stride of one row means nothing
      check_library(op, cublasLtMatrixLayoutInit(&to, type, static_cast<std::uint64_t>(columns),
                                                 static_cast<std::uint64_t>(rows), stride));
    };
    layout(p.left, x.operands, x.tb == transpose::yes ? x.n : x.k, x.tb == transpose::yes ? x.k : x.n, x.ldb);
    layout(p.right, x.operands, x.ta == transpose::yes ? x.k : x.m, x.ta == transpose::yes ? x.m : x.k, x.lda);
    layout(p.result, x.result, x.m, x.n, x.ldc);

    cublasLtMatmulPreferenceOpaque_t preference;
    check_library(op, cublasLtMatmulPreferenceInit(&preference));
    auto const prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check_library(op, cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(x.workspace_bytes));
    // Sums over parts of the depth are kept unrounded until they are complete.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(x.b));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(x.a));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(x.c));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(x.c));
    cublasLtMatmulHeuristicResult_t choice{};
    int found = 0;
    // Any failure here means that there is none: the caller has a kernel of its own.
    p.possible = cublasLtMatmulAlgoGetHeuristic(p.handle, &p.description, &p.left, &p.right, &p.result, &p.result,
                                                &preference, 1, &choice, &found) == CUBLAS_STATUS_SUCCESS &&
                 found == 1 && choice.state == CUBLAS_STATUS_SUCCESS && choice.workspaceSize <= x.workspace_bytes;
    p.algorithm = choice.algo;
    return p;
  }

  std::mutex mutex_;
  std::unordered_map<int, cublasLtHandle_t> handles_;
  std::unordered_map<plan_key, plan, hash> plans_;
};

/// Enqueues the product where the library can: no groups, operands of one type, a result of that type or of its
/// accumulation type, a bias only where the result is of the bias's type, and no sum with 16-bit elements of C, before
/// which it would round the product.
template <class TA, class TB, class TC>
bool library_product(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x, void* workspace,
                     std::size_t workspace_bytes) {
  if constexpr (std::is_same_v<TA, TB> && (std::is_same_v<TC, TA> || std::is_same_v<TC, accum_t<TA>>)) {
    if (x.groups.by != grouping::none || x.k == 0 ||
        (!std::is_same_v<TC, accum_t<TC>> && (x.bias || x.mode == update::accumulate)))
      return false;
    bool const done = gemm_library::instance().run(op, policy.stream,
                                                   {.operands = library_type<TA>(),
                                                    .result = library_type<TC>(),
                                                    .ta = x.ta,
                                                    .tb = x.tb,
                                                    .m = x.m,
                                                    .n = x.n,
                                                    .k = x.k,
                                                    .lda = x.lda,
                                                    .ldb = x.ldb,
                                                    .ldc = x.ldc,
                                                    .a = x.a,
                                                    .b = x.b,
                                                    .c = x.c,
                                                    .accumulate = x.mode == update::accumulate,
                                                    .bias = x.bias,
                                                    .workspace = workspace,
                                                    .workspace_bytes = workspace_bytes});
    if (done && synchronise_each_launch) check(op, cudaStreamSynchronize(policy.stream));
    return done;
  } else {
    return false;
  }
}

}  // namespace blackmamba::cuda::detail
