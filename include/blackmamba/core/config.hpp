#pragma once
/// Every macro of the library stands here (the version's stand in version.hpp).

/// BLACKMAMBA_CUDA: 1 where this translation unit is compiled as CUDA, else 0.
#if defined(__CUDACC__)
#define BLACKMAMBA_CUDA 1
#else
#define BLACKMAMBA_CUDA 0
#endif

/// BLACKMAMBA_HD: marks a function that runs on host and device. Mathematics is written with it once.
#if BLACKMAMBA_CUDA
#define BLACKMAMBA_HD __host__ __device__
#else
#define BLACKMAMBA_HD
#endif

/// BLACKMAMBA_INLINE: for the few innermost functions whose cost model must not depend on the optimiser's mood.
#if defined(__GNUC__) || defined(__clang__)
#define BLACKMAMBA_INLINE inline __attribute__((always_inline))
#else
#define BLACKMAMBA_INLINE inline
#endif

/// BLACKMAMBA_HD_WHERE_DEFINED: before a template marked BLACKMAMBA_HD that is also used with types that the host alone
/// knows (simd packs): nvcc is not to ask that both sides can run it.
#if BLACKMAMBA_CUDA
#define BLACKMAMBA_HD_WHERE_DEFINED _Pragma("nv_exec_check_disable")
#else
#define BLACKMAMBA_HD_WHERE_DEFINED
#endif

/// BLACKMAMBA_ASSERT: a precondition, checked on the host in builds that neither optimise nor define NDEBUG. Define
/// BLACKMAMBA_CHECKED as 1 to have it checked in builds that optimise too, as 0 to have it checked nowhere.
#if !defined(BLACKMAMBA_CHECKED)
#if defined(NDEBUG) || defined(__OPTIMIZE__)
#define BLACKMAMBA_CHECKED 0
#else
#define BLACKMAMBA_CHECKED 1
#endif
#endif
#if BLACKMAMBA_CHECKED && !defined(__CUDA_ARCH__)
#include <cassert>
#define BLACKMAMBA_ASSERT(condition) assert(condition)
#else
#define BLACKMAMBA_ASSERT(condition) static_cast<void>(0)
#endif
