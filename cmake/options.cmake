# Every option of the build. A project that consumes blackmamba gets the headers and nothing else.

option(BLACKMAMBA_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(BLACKMAMBA_BUILD_EXAMPLES "Build the examples" ${PROJECT_IS_TOP_LEVEL})
option(BLACKMAMBA_BUILD_BENCH "Build the benchmarks" ${PROJECT_IS_TOP_LEVEL})
option(BLACKMAMBA_INSTALL "Provide the install target" ${PROJECT_IS_TOP_LEVEL})
option(BLACKMAMBA_NATIVE "Compile tests, examples and benchmarks for this machine's processor" ${PROJECT_IS_TOP_LEVEL})
option(BLACKMAMBA_OPTIMISE "Optimise benchmarks and examples; OFF where they are only to compile, and examples to work" ON)
option(BLACKMAMBA_WERROR "Treat warnings in tests, examples and benchmarks as errors" OFF)

set(BLACKMAMBA_CUDA AUTO CACHE STRING "Provide blackmamba::cuda: AUTO (where a toolkit is found), ON, OFF")
set_property(CACHE BLACKMAMBA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(BLACKMAMBA_SANITIZE "" CACHE STRING "Sanitizers of the tests: empty, \"address,undefined\" or \"thread\"")
set_property(CACHE BLACKMAMBA_SANITIZE PROPERTY STRINGS "" "address,undefined" "thread")

if(NOT BLACKMAMBA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "blackmamba: BLACKMAMBA_CUDA is \"${BLACKMAMBA_CUDA}\"; expected AUTO, ON or OFF")
endif()
if(NOT BLACKMAMBA_SANITIZE MATCHES "^(|address,undefined|thread)$")
  message(FATAL_ERROR
    "blackmamba: BLACKMAMBA_SANITIZE is \"${BLACKMAMBA_SANITIZE}\"; expected nothing, \"address,undefined\" or "
    "\"thread\"")
endif()

include(GNUInstallDirs)

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
