# Defines blackmamba::cuda where a CUDA toolkit is found, or where BLACKMAMBA_CUDA asks for one. The build includes this
# file, and so does the installed package, so that a package made on a machine without CUDA serves one that has it.

if(NOT TARGET blackmamba::cuda AND NOT "${BLACKMAMBA_CUDA}" STREQUAL "OFF")
  if("${BLACKMAMBA_CUDA}" STREQUAL "ON")
    find_package(CUDAToolkit REQUIRED)
  else()
    find_package(CUDAToolkit QUIET)
  endif()
  if(TARGET CUDA::cudart AND TARGET CUDA::cublasLt)
    add_library(blackmamba::cuda INTERFACE IMPORTED ${blackmamba_cuda_scope})
    target_link_libraries(blackmamba::cuda INTERFACE blackmamba::blackmamba CUDA::cudart CUDA::cublasLt)
    # CMake releases older than the toolkit do not know cuda_std_20, and naming it would stop the configuration.
    if("cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
      target_compile_features(blackmamba::cuda INTERFACE cuda_std_20)
    else()
      target_compile_options(blackmamba::cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    endif()
  endif()
endif()
