# Installation: headers, CMake package, pkg-config file. Nothing installed depends on the machine it was made on.

include(CMakePackageConfigHelpers)

set(blackmamba_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/blackmamba)
set(blackmamba_pkgconfig_dir ${CMAKE_INSTALL_DATADIR}/pkgconfig)

install(DIRECTORY include/blackmamba DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/blackmamba)

# The headers reach a consumer by -I, as in the build tree, not by -isystem: nvcc searches its own toolkit before system
# directories, and a copy there would win silently. (EXPORT_NO_SYSTEM is read by CMake 3.25 and later; the package's
# config sets the property that older consumers know.)
set_target_properties(blackmamba PROPERTIES EXPORT_NO_SYSTEM ON)
install(TARGETS blackmamba EXPORT blackmamba-targets)
install(EXPORT blackmamba-targets NAMESPACE blackmamba:: DESTINATION ${blackmamba_package_dir})

configure_package_config_file(cmake/blackmamba-config.cmake.in package/blackmamba-config.cmake
  INSTALL_DESTINATION ${blackmamba_package_dir}
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/package/blackmamba-config-version.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/package/blackmamba-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/package/blackmamba-config-version.cmake
  cmake/blackmamba-cuda.cmake
  DESTINATION ${blackmamba_package_dir})

# pkg-config finds the prefix from where the file lies, so that the tree can be moved.
file(RELATIVE_PATH blackmamba_pc_to_prefix /${blackmamba_pkgconfig_dir} /)
string(REGEX REPLACE "/$" "" blackmamba_pc_to_prefix "${blackmamba_pc_to_prefix}")
configure_file(cmake/blackmamba.pc.in package/blackmamba.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/package/blackmamba.pc DESTINATION ${blackmamba_pkgconfig_dir})
