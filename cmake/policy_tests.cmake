# Test programs.
#
# A test body tests/<layer>/<name>_test.hpp speaks of test_policy alone; for each backend the build writes the
# translation unit that says which policy that is, and makes a program of it: <layer>.<name>.cpu, and where CUDA is
# enabled and the subject has CUDA files <layer>.<name>.cuda (label gpu). A tests/**/<name>_test.cpp is a program by
# itself, and so is a tests/**/<name>_test.cu where CUDA is enabled: what compares devices.
# Files are found by pattern: a new one needs no line here.

# The programs of what divides its work among threads with care: ThreadSanitizer runs these. (Training runs the rest,
# whose rows are independent.)
set(BLACKMAMBA_PARALLEL_TESTS
  "parallel_for|gemm|scan|linear|recurrence|conv1d|attention|dispatch|embedding|sinkhorn|cross_entropy|adamw|train"
  CACHE STRING
  "Regular expression over test names: what is labelled \"parallel\"")
mark_as_advanced(BLACKMAMBA_PARALLEL_TESTS)

# Sanitizers slow a program down by 3 to 20 times, and look at each access, not at its value: they are given a share of
# the random problems that the plain programs go through whole (support.hpp: trials).
set(blackmamba_test_prefix "")
set(blackmamba_test_environment "")
if(BLACKMAMBA_SANITIZE STREQUAL "thread")
  set(blackmamba_test_prefix "tsan.")
  set(blackmamba_test_environment "TSAN_OPTIONS=halt_on_error=1;BLACKMAMBA_TEST_TRIALS_PERCENT=4")
elseif(BLACKMAMBA_SANITIZE)
  set(blackmamba_test_prefix "asan.")
  set(blackmamba_test_environment "UBSAN_OPTIONS=print_stacktrace=1;BLACKMAMBA_TEST_TRIALS_PERCENT=10")
endif()

add_library(blackmamba_test_main OBJECT support/main.cpp)
target_include_directories(blackmamba_test_main PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
# Where tests find golden/.
target_compile_definitions(blackmamba_test_main PUBLIC BLACKMAMBA_TEST_DATA="${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(blackmamba_test_main PUBLIC blackmamba_developer doctest::doctest)
# To sanitizers a type of 16 bits is like the other, and gradients are tested in double anyway.
if(BLACKMAMBA_SANITIZE)
  target_compile_definitions(blackmamba_test_main PUBLIC "STORAGE_TYPES=float,blackmamba::bfloat16")
endif()
# Tests run for seconds and compile for minutes: one level of optimisation takes half the time of three. nvcc, whose
# level is the host code's alone, wants to be told once.
target_compile_options(blackmamba_test_main PUBLIC $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O1>)
if(blackmamba_cuda_compiled_only)
  target_compile_options(blackmamba_test_main PUBLIC $<$<COMPILE_LANGUAGE:CUDA>:-Xcicc=-O0>)
endif()
if(DEFINED CMAKE_CUDA_FLAGS_RELEASE)
  set(level -O1)
  if(blackmamba_cuda_compiled_only)
    set(level -O0)
  endif()
  string(REGEX REPLACE "-O[0-9]" "${level}" CMAKE_CUDA_FLAGS_RELEASE "${CMAKE_CUDA_FLAGS_RELEASE}")
endif()

# blackmamba_add_test(<name> <source> <label>...): one program, one test.
function(blackmamba_add_test name source)
  set(labels ${ARGN})
  if(name MATCHES "${BLACKMAMBA_PARALLEL_TESTS}")
    list(APPEND labels parallel)
  elseif(BLACKMAMBA_SANITIZE STREQUAL "thread")
    return()
  endif()
  string(REPLACE "." "_" target ${name})
  set(target test_${target})
  add_executable(${target} ${source})
  target_link_libraries(${target} PRIVATE blackmamba_test_main)
  if(source MATCHES "\\.cu$")
    target_link_libraries(${target} PRIVATE blackmamba::cuda)
    # Every operator at every type: also as the oldest GPU takes it.
    if(blackmamba_cuda_compiled_only AND name MATCHES "^ops\\.")
      set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "80-virtual;90a-virtual")
    endif()
  endif()
  # With sanitizers, what composes operators (models, training, generation) and what reads golden files takes a minute to
  # optimise and a second to run.
  if(BLACKMAMBA_SANITIZE AND name MATCHES "^(train|model|generate)\\.|golden")
    target_compile_options(${target} PRIVATE -O0)
  endif()
  # Each test runs in a folder of its own, for the files it writes.
  set(run_dir ${CMAKE_CURRENT_BINARY_DIR}/run/${name})
  file(MAKE_DIRECTORY ${run_dir})
  set(full_name ${blackmamba_test_prefix}${name})
  add_test(NAME ${full_name}
    COMMAND ${blackmamba_sanitizer_launcher} $<TARGET_FILE:${target}>
    WORKING_DIRECTORY ${run_dir})
  set_tests_properties(${full_name} PROPERTIES
    LABELS "${labels}"
    SKIP_RETURN_CODE 77
    TIMEOUT 600
    ENVIRONMENT "${blackmamba_test_environment}")
endfunction()

# blackmamba_policy_test(<layer> <name>): the programs of one test body.
function(blackmamba_policy_test layer name)
  set(body ${layer}/${name}_test.hpp)
  set(directory ${CMAKE_CURRENT_BINARY_DIR}/${layer})

  file(CONFIGURE OUTPUT ${directory}/${name}_cpu.cpp @ONLY CONTENT
    "#include \"support/policy_cpu.hpp\"\n\n#include \"@body@\"\n")
  blackmamba_add_test(${layer}.${name}.cpu ${directory}/${name}_cpu.cpp ${layer})

  if(blackmamba_with_cuda)
    blackmamba_subject_has_cuda(${layer} ${name} has_cuda)
    if(has_cuda)
      file(CONFIGURE OUTPUT ${directory}/${name}_cuda.cu @ONLY CONTENT
        "#include \"support/policy_cuda.hpp\"\n\n#include \"@body@\"\n")
      blackmamba_add_test(${layer}.${name}.cuda ${directory}/${name}_cuda.cu ${layer} gpu)
    endif()
  endif()
endfunction()

# blackmamba_operators_without_cuda(<result> <operator>...): those whose folder has no <operator>_cuda.cuh.
function(blackmamba_operators_without_cuda result)
  set(without "")
  foreach(operator IN LISTS ARGN)
    if(NOT EXISTS ${PROJECT_SOURCE_DIR}/include/blackmamba/ops/${operator}/${operator}_cuda.cuh)
      list(APPEND without ${operator})
    endif()
  endforeach()
  set(${result} "${without}" PARENT_SCOPE)
endfunction()

# A test of operators runs on CUDA where the one that it is named after and all whose headers it includes have their CUDA
# file, core's where core/cuda has any, and what is composed of operators where all of them have theirs.
function(blackmamba_subject_has_cuda layer name result)
  set(include ${PROJECT_SOURCE_DIR}/include/blackmamba)
  file(GLOB core_cuda CONFIGURE_DEPENDS ${include}/core/cuda/*)
  file(GLOB operators CONFIGURE_DEPENDS RELATIVE ${include}/ops ${include}/ops/*)
  file(GLOB cuda_files CONFIGURE_DEPENDS ${include}/ops/*/*_cuda.cuh)  # configures again where one comes
  set(has_cuda ON)
  if(layer STREQUAL "core")
    # What core/cpu holds is the host's alone.
    file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/${layer}/${name}_test.hpp of_the_host REGEX "#include <blackmamba/core/cpu/")
    if(of_the_host OR NOT core_cuda)
      set(has_cuda OFF)
    endif()
  else()
    if(layer STREQUAL "ops")
      set(body ${CMAKE_CURRENT_SOURCE_DIR}/${layer}/${name}_test.hpp)
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${body})
      file(STRINGS ${body} lines REGEX "^#include <blackmamba/ops/")
      list(FIND operators ${name} own)
      string(REGEX REPLACE "#include <blackmamba/ops/([a-z0-9_]+)/[^;]*" "\\1" operators "${lines}")
      if(NOT own EQUAL -1)
        list(APPEND operators ${name})
      endif()
    endif()
    blackmamba_operators_without_cuda(without ${operators})
    if(without OR NOT operators)
      set(has_cuda OFF)
    endif()
  endif()
  set(${result} ${has_cuda} PARENT_SCOPE)
endfunction()

# Every test body and every test program that lies under tests/.
function(blackmamba_find_tests)
  foreach(layer IN ITEMS core ops nn model train generate)
    file(GLOB bodies CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}/${layer} ${layer}/*_test.hpp)
    foreach(body IN LISTS bodies)
      string(REGEX REPLACE "_test\\.hpp$" "" name ${body})
      blackmamba_policy_test(${layer} ${name})
    endforeach()
  endforeach()

  file(GLOB_RECURSE programs CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} *_test.cpp)
  foreach(program IN LISTS programs)
    string(REGEX REPLACE "_test\\.cpp$" "" name ${program})
    string(REPLACE "/" "." name ${name})
    string(REGEX MATCH "^[a-z_]+" layer ${name})
    blackmamba_add_test(${name} ${program} ${layer})
  endforeach()

  if(blackmamba_with_cuda)
    file(GLOB_RECURSE programs CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} *_test.cu)
    foreach(program IN LISTS programs)
      string(REGEX REPLACE "_test\\.cu$" "" name ${program})
      string(REPLACE "/" "." name ${name})
      string(REGEX MATCH "^[a-z_]+" layer ${name})
      blackmamba_add_test(${name} ${program} ${layer} gpu)
    endforeach()
  endif()
endfunction()

# g++ sees overflows in packs where clang++, which the sanitizer builds use, does not: what computes on the bits of packs
# runs under g++'s too.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND NOT BLACKMAMBA_SANITIZE)
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/core/simd_ubsan.cpp @ONLY CONTENT
    "#include \"support/policy_cpu.hpp\"\n\n#include \"core/simd_test.hpp\"\n")
  blackmamba_add_test(core.simd.ubsan ${CMAKE_CURRENT_BINARY_DIR}/core/simd_ubsan.cpp core)
  target_compile_options(test_core_simd_ubsan PRIVATE -fsanitize=undefined -fno-sanitize-recover=all)
  target_link_options(test_core_simd_ubsan PRIVATE -fsanitize=undefined)
endif()
