# Compile-fail tests: every file in tests/compile_fail must be rejected by each compiler, with the text that it quotes
# (tests/compile_fail/expect_error.py says how). CUDA cases (.cu) are for nvcc.

file(GLOB cases CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}/compile_fail compile_fail/*.cpp)
file(GLOB cuda_cases CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}/compile_fail compile_fail/*.cu)
set(expect_error ${Python3_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/compile_fail/expect_error.py)

function(blackmamba_compile_fail_test case compiler)
  get_filename_component(compiler_name ${compiler} NAME)
  get_filename_component(name ${case} NAME_WE)
  add_test(NAME compile_fail.${name}.${compiler_name}
    COMMAND ${expect_error} ${CMAKE_CURRENT_SOURCE_DIR}/compile_fail/${case} -- ${compiler} ${ARGN})
  set_tests_properties(compile_fail.${name}.${compiler_name} PROPERTIES LABELS compile_fail)
endfunction()

foreach(case IN LISTS cases)
  blackmamba_compile_fail_test(${case} ${CMAKE_CXX_COMPILER} ${blackmamba_plain_flags} -fsyntax-only)
  if(BLACKMAMBA_OTHER_CXX)
    blackmamba_compile_fail_test(${case} ${BLACKMAMBA_OTHER_CXX} ${blackmamba_plain_flags} -fsyntax-only)
  endif()
endforeach()
if(blackmamba_with_cuda)
  foreach(case IN LISTS cuda_cases)
    blackmamba_compile_fail_test(${case} ${CMAKE_CUDA_COMPILER} ${blackmamba_plain_flags}
      -arch=sm_90a -ptx -o /dev/null)
  endforeach()
endif()

# The framework itself: it must not pass a file that compiles, nor one that fails for another reason.
add_test(NAME compile_fail.framework
  COMMAND ${Python3_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/compile_fail/expect_error_test.py ${CMAKE_CXX_COMPILER})
set_tests_properties(compile_fail.framework PROPERTIES LABELS compile_fail)
