# Header tests. Every header is found by pattern, none can be left out.
#
# Alone: a translation unit for each header, which includes it twice (guards) and nothing else, under strict warnings as
# errors. Linked twice: these units are linked with one more that includes all headers, so that a function which is
# defined in a header without `inline` is there twice, and the linker says so.
#
# nvcc takes three seconds for what the others do in a fraction of one. The C++ headers are known to stand alone when it
# gets them, so that it gets them by folder; the CUDA headers (.cuh) it gets alone, but for those that another one of an
# operator's folder includes: parts of it, which the contract brings in with it.

file(GLOB_RECURSE blackmamba_hpp CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/include
  ${PROJECT_SOURCE_DIR}/include/blackmamba/*.hpp)
file(GLOB_RECURSE blackmamba_cuh CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/include
  ${PROJECT_SOURCE_DIR}/include/blackmamba/*.cuh)

set(blackmamba_cuh_alone "")
foreach(header IN LISTS blackmamba_cuh)
  get_filename_component(folder ${header} DIRECTORY)
  set(readers "")
  if(folder MATCHES "^blackmamba/ops/")
    foreach(other IN LISTS blackmamba_cuh)
      if(other MATCHES "^${folder}/")
        file(STRINGS ${PROJECT_SOURCE_DIR}/include/${other} reads REGEX "#include <${header}>")
        list(APPEND readers ${reads})
      endif()
    endforeach()
  endif()
  if(NOT readers)
    list(APPEND blackmamba_cuh_alone ${header})
  endif()
endforeach()

# blackmamba_header_units(<result> <directory> <extension> [ALONE <header>...] [BY_FOLDER <header>...])
function(blackmamba_header_units result directory extension)
  cmake_parse_arguments(PARSE_ARGV 3 headers "" "" "ALONE;BY_FOLDER")
  set(all "")
  set(stems "")
  foreach(header IN LISTS headers_ALONE)
    # An operator's own CUDA header comes first in its folder's unit: alone there too.
    get_filename_component(folder ${header} DIRECTORY)
    get_filename_component(operator ${folder} NAME)
    if(headers_BY_FOLDER AND header STREQUAL "${folder}/${operator}_cuda.cuh")
      string(REPLACE "/" "." stem ${folder})
    else()
      string(REPLACE "/" "." stem ${header})
    endif()
    list(APPEND stems ${stem})
    set(text_${stem} "#include <${header}>\n#include <${header}>\n")
    string(APPEND all "#include <${header}>\n")
  endforeach()
  foreach(header IN LISTS headers_BY_FOLDER)
    get_filename_component(stem ${header} DIRECTORY)
    string(REPLACE "/" "." stem ${stem})
    list(APPEND stems ${stem})
    string(APPEND text_${stem} "#include <${header}>\n")
    string(APPEND all "#include <${header}>\n")
  endforeach()
  list(REMOVE_DUPLICATES stems)
  set(units ${directory}/all_headers.${extension})
  file(CONFIGURE OUTPUT ${units} CONTENT "${all}\nint main() {}\n" @ONLY)
  foreach(stem IN LISTS stems)
    file(CONFIGURE OUTPUT ${directory}/${stem}.${extension} CONTENT "${text_${stem}}" @ONLY)
    list(APPEND units ${directory}/${stem}.${extension})
  endforeach()
  set(${result} ${units} PARENT_SCOPE)
endfunction()

# The main compiler.
set(blackmamba_header_dir ${CMAKE_CURRENT_BINARY_DIR}/headers)
blackmamba_header_units(header_units ${blackmamba_header_dir}/cxx cpp ALONE ${blackmamba_hpp})
add_executable(headers_cxx ${header_units})
target_link_libraries(headers_cxx PRIVATE blackmamba::blackmamba)
target_compile_options(headers_cxx PRIVATE ${blackmamba_warnings} -Werror -O0)
add_test(NAME headers.alone_and_twice.cxx COMMAND headers_cxx)
set_tests_properties(headers.alone_and_twice.cxx PROPERTIES LABELS headers)

# The other compiler, where it is installed: each unit alone, syntax and semantics only.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(other_names clang++)
else()
  set(other_names g++)
endif()
find_program(BLACKMAMBA_OTHER_CXX ${other_names})
mark_as_advanced(BLACKMAMBA_OTHER_CXX)

# The system include directories that blackmamba::blackmamba brings, for compilers that are called without a target.
get_target_property(blackmamba_eigen_dirs Eigen3::Eigen INTERFACE_INCLUDE_DIRECTORIES)
set(blackmamba_plain_flags -std=c++20 -I${PROJECT_SOURCE_DIR}/include)
foreach(directory IN LISTS blackmamba_eigen_dirs)
  list(APPEND blackmamba_plain_flags -isystem ${directory})
endforeach()

if(BLACKMAMBA_OTHER_CXX)
  get_filename_component(other_name ${BLACKMAMBA_OTHER_CXX} NAME)
  set(stamps "")
  foreach(unit IN LISTS header_units)
    get_filename_component(stem ${unit} NAME_WLE)
    set(stamp ${blackmamba_header_dir}/other/${stem}.ok)
    add_custom_command(OUTPUT ${stamp}
      COMMAND ${BLACKMAMBA_OTHER_CXX} ${blackmamba_plain_flags} ${blackmamba_warnings} -Werror -fsyntax-only
        -MD -MF ${stamp}.d -MT ${stamp} ${unit}
      COMMAND ${CMAKE_COMMAND} -E touch ${stamp}
      DEPENDS ${unit}
      DEPFILE ${stamp}.d
      COMMENT "${other_name}: ${stem} alone"
      VERBATIM)
    list(APPEND stamps ${stamp})
  endforeach()
  file(MAKE_DIRECTORY ${blackmamba_header_dir}/other)
  add_custom_target(headers_other ALL DEPENDS ${stamps})
  # The test builds the target again: nothing to do where all is well, and a failure cannot hide behind old stamps.
  add_test(NAME headers.alone.${other_name}
    COMMAND ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR} --target headers_other)
  set_tests_properties(headers.alone.${other_name} PROPERTIES LABELS headers RUN_SERIAL ON)
endif()

if(blackmamba_with_cuda)
  # nvcc: the C++ headers as CUDA, and the CUDA headers.
  blackmamba_header_units(header_units ${blackmamba_header_dir}/cuda cu
    ALONE ${blackmamba_cuh_alone} BY_FOLDER ${blackmamba_hpp})
  add_executable(headers_cuda ${header_units})
  target_link_libraries(headers_cuda PRIVATE blackmamba::cuda)
  target_compile_options(headers_cuda PRIVATE ${blackmamba_cuda_warnings}
    "SHELL:-Werror all-warnings -Xcompiler=-Werror -Xcompiler=-O0")
  if(blackmamba_cuda_compiled_only)
    target_compile_options(headers_cuda PRIVATE -Xcicc=-O0)
  else()
    set_target_properties(headers_cuda PROPERTIES CUDA_ARCHITECTURES 90a-real)
  endif()
  add_test(NAME headers.twice.cuda COMMAND headers_cuda)
  set_tests_properties(headers.twice.cuda PROPERTIES LABELS headers)

  # The umbrella in two units of one program, each of which trains and generates, so that all device code is compiled for
  # two architectures and as PTX, and linked twice. Assertions are on.
  foreach(unit IN ITEMS first second)
    set(architecture transformer_moe)
    if(unit STREQUAL "first")
      set(architecture blackmamba_model)
    endif()
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/umbrella/unit.cu.in ${blackmamba_header_dir}/umbrella/${unit}.cu @ONLY)
  endforeach()
  add_executable(headers_umbrella_cuda ${blackmamba_header_dir}/umbrella/first.cu
    ${blackmamba_header_dir}/umbrella/second.cu umbrella/main.cpp)
  target_link_libraries(headers_umbrella_cuda PRIVATE blackmamba::cuda)
  target_compile_options(headers_umbrella_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-UNDEBUG>)
  set_target_properties(headers_umbrella_cuda PROPERTIES CUDA_ARCHITECTURES "80;90a-real")
  add_test(NAME headers.umbrella_twice.cuda COMMAND headers_umbrella_cuda)
  set_tests_properties(headers.umbrella_twice.cuda PROPERTIES LABELS "headers;gpu" SKIP_RETURN_CODE 77)
endif()
