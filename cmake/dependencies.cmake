# Dependencies: the system's package where there is one, else the pinned revision, fetched.
# With the packages installed, configuring needs no network.
#
# The header-only ones become imported targets of the name that their own packages export, so that what depends on them
# reads the same either way.

include(FetchContent)

# blackmamba_fetch_headers(<name> <target> <git-repository> <commit> <include-subdirectory>)
macro(blackmamba_fetch_headers name target repository commit subdirectory)
  message(STATUS "blackmamba: ${name} is not installed; fetching ${repository} at ${commit}")
  # Only the headers are wanted: a SOURCE_SUBDIR without a CMakeLists.txt keeps the dependency's own build out of ours.
  FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${commit} SOURCE_SUBDIR blackmamba-no-build)
  FetchContent_MakeAvailable(${name})
  string(TOLOWER ${name} lower_name)
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${${lower_name}_SOURCE_DIR}/${subdirectory}")
endmacro()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 3.4 QUIET NO_MODULE)
endif()
if(NOT TARGET Eigen3::Eigen)
  blackmamba_fetch_headers(eigen Eigen3::Eigen
    https://gitlab.com/libeigen/eigen.git 3147391d946bb4b6c68edd901f2add6ac1f31f8c "")  # 3.4.0
endif()

if(BLACKMAMBA_BUILD_TESTS)
  if(NOT TARGET doctest::doctest)
    find_package(doctest 2.4 QUIET)
  endif()
  if(NOT TARGET doctest::doctest)
    blackmamba_fetch_headers(doctest doctest::doctest
      https://github.com/doctest/doctest.git ae7a13539fb71f270b87eb2e874fbac80bc8dda2 "")  # 2.4.11
  endif()
endif()
