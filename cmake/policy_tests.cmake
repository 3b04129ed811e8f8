# Test programs.
#
# A test body tests/<layer>/<name>_test.hpp speaks of test_policy alone; for each backend the build writes the
# translation unit that says which policy that is, and makes a program of it: <layer>.<name>.cpu, and where CUDA is
# enabled and the subject has CUDA files <layer>.<name>.cuda (label gpu). A tests/**/<name>_test.cpp is a program by
# itself, and so is a tests/**/<name>_test.cu where CUDA is enabled: what compares devices.
# Files are found by pattern: a new one needs no line here.

# The programs that run work on several threads; ThreadSanitizer runs these.
set(BLACKMAMBA_PARALLEL_TESTS "parallel_for|gemm|scan|linear|train" CACHE STRING
  "Regular expression over test names: what is labelled \"parallel\"")
mark_as_advanced(BLACKMAMBA_PARALLEL_TESTS)

set(blackmamba_test_prefix "")
if(BLACKMAMBA_SANITIZE STREQUAL "thread")
  set(blackmamba_test_prefix "tsan.")
elseif(BLACKMAMBA_SANITIZE)
  set(blackmamba_test_prefix "asan.")
endif()

add_library(blackmamba_test_main OBJECT support/main.cpp)
target_include_directories(blackmamba_test_main PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
# Where tests find golden/.
target_compile_definitions(blackmamba_test_main PUBLIC BLACKMAMBA_TEST_DATA="${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(blackmamba_test_main PUBLIC blackmamba_developer doctest::doctest)
# Tests run for seconds and compile for minutes: one level of optimisation takes half the time of three.
target_compile_options(blackmamba_test_main PUBLIC $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O1>)

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
    ENVIRONMENT "UBSAN_OPTIONS=print_stacktrace=1;TSAN_OPTIONS=halt_on_error=1")
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

# An operator's test runs on CUDA where the operator has its CUDA file, core's where core/cuda has any, and what is
# composed of operators where all of them have theirs.
function(blackmamba_subject_has_cuda layer name result)
  set(include ${PROJECT_SOURCE_DIR}/include/blackmamba)
  set(${result} OFF PARENT_SCOPE)
  if(layer STREQUAL "ops")
    if(EXISTS ${include}/ops/${name}/${name}_cuda.cuh)
      set(${result} ON PARENT_SCOPE)
    endif()
  else()
    file(GLOB core_cuda CONFIGURE_DEPENDS ${include}/core/cuda/*)
    file(GLOB contracts CONFIGURE_DEPENDS ${include}/ops/*)
    file(GLOB with_cuda CONFIGURE_DEPENDS ${include}/ops/*/*_cuda.cuh)
    list(LENGTH contracts operators)
    list(LENGTH with_cuda cuda_operators)
    if((layer STREQUAL "core" AND core_cuda) OR
       (NOT layer STREQUAL "core" AND operators GREATER 0 AND operators EQUAL cuda_operators))
      set(${result} ON PARENT_SCOPE)
    endif()
  endif()
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
