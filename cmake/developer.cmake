# What tests, examples and benchmarks are compiled with. None of it reaches a consumer of the library.

# C++20 itself comes with blackmamba::blackmamba. (CMAKE_CXX_STANDARD would be taken for CUDA's standard too, and stop
# CMake releases that do not know CUDA's 20.)
set(CMAKE_CXX_EXTENSIONS OFF)
# There are no modules to look for; where CMake would, it wants a program that clang's package need not bring.
set(CMAKE_CXX_SCAN_FOR_MODULES OFF)

set(blackmamba_warnings -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wsign-conversion)
set(blackmamba_gcc_warnings)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlapping copies in std::string's operator+ that are not there (GCC bug 105651).
  # And undefined vectors that its own <immintrin.h> leaves undefined on purpose (GCC bug 105593).
  # Of GCC alone: the header tests hand the other warnings to a second compiler too.
  set(blackmamba_gcc_warnings -Wno-restrict -Wno-maybe-uninitialized)
endif()
# nvcc's own generated host code is not pedantic, so -Wpedantic stays out of what is handed to its host compiler.
set(blackmamba_cuda_warnings -Xcompiler=-Wall,-Wextra,-Wconversion,-Wshadow)
foreach(warning IN LISTS blackmamba_gcc_warnings)
  list(APPEND blackmamba_cuda_warnings -Xcompiler=${warning})
endforeach()

# blackmamba_developer: link it to a program of this project.
add_library(blackmamba_developer INTERFACE)
target_link_libraries(blackmamba_developer INTERFACE blackmamba::blackmamba)
target_compile_options(blackmamba_developer INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${blackmamba_warnings};${blackmamba_gcc_warnings}>"
  "$<$<COMPILE_LANGUAGE:CUDA>:${blackmamba_cuda_warnings}>")
if(BLACKMAMBA_WERROR)
  target_compile_options(blackmamba_developer INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror>
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Werror>")
endif()
if(BLACKMAMBA_NATIVE)
  target_compile_options(blackmamba_developer INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-march=native> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-march=native>)
endif()

# Sanitizers. Fixed addresses: the sanitizers of older compilers cannot place their shadow memory on kernels that
# randomise addresses by more than 28 bits, and stop before main; setarch -R runs the program without randomisation.
set(blackmamba_sanitizer_launcher)
if(BLACKMAMBA_SANITIZE)
  target_compile_options(blackmamba_developer INTERFACE
    -fsanitize=${BLACKMAMBA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  target_link_options(blackmamba_developer INTERFACE -fsanitize=${BLACKMAMBA_SANITIZE})
  find_program(BLACKMAMBA_SETARCH setarch)
  mark_as_advanced(BLACKMAMBA_SETARCH)
  if(BLACKMAMBA_SETARCH)
    execute_process(COMMAND ${BLACKMAMBA_SETARCH} -R true RESULT_VARIABLE setarch_result OUTPUT_QUIET ERROR_QUIET)
    if(setarch_result EQUAL 0)
      set(blackmamba_sanitizer_launcher ${BLACKMAMBA_SETARCH} -R)
    endif()
  endif()
endif()

# CUDA as a language is wanted by the tests, examples and benchmarks alone.
set(blackmamba_with_cuda OFF)
set(blackmamba_cuda_compiled_only OFF)
if(TARGET blackmamba::cuda AND NOT BLACKMAMBA_SANITIZE)
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS ${CUDAToolkit_BIN_DIR})
  include(CheckLanguage)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    find_program(BLACKMAMBA_NVIDIA_SMI nvidia-smi)
    mark_as_advanced(BLACKMAMBA_NVIDIA_SMI)
    set(capabilities "")
    if(BLACKMAMBA_NVIDIA_SMI)
      execute_process(COMMAND ${BLACKMAMBA_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE capabilities ERROR_QUIET)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
      list(REMOVE_DUPLICATES capabilities)
    endif()
    if(capabilities)
      # Not "native", which is sm_90 on a Hopper: the instructions of its warpgroups belong to sm_90a alone.
      string(REPLACE "." "" capabilities "${capabilities}")
      string(REGEX REPLACE "([0-9]+)" "\\1-real" CMAKE_CUDA_ARCHITECTURES "${capabilities}")
      string(REPLACE "90-real" "90a-real" CMAKE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
      message(STATUS "blackmamba: CUDA code for the GPUs that are here: ${CMAKE_CUDA_ARCHITECTURES}")
    else()
      # Nothing can run here: PTX says whether the code compiles, for tests without optimisation, which takes half the time.
      # The umbrella's test optimises and assembles it for two architectures.
      set(CMAKE_CUDA_ARCHITECTURES 90a-virtual)
      set(blackmamba_cuda_compiled_only ON)
      message(STATUS "blackmamba: no GPU is here: CUDA is compiled to PTX, tests without optimisation; for programs that run "
        "elsewhere set CMAKE_CUDA_ARCHITECTURES")
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(blackmamba_with_cuda ON)
  elseif(BLACKMAMBA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "blackmamba: BLACKMAMBA_CUDA is ON, and no nvcc was found")
  endif()
endif()
