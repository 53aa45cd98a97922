# SPDX-License-Identifier: Apache-2.0
#
# The headers of NVSHMEM: of NVSHMEM_HOME, or of the wheel nvidia-nvshmem-cu12 or -cu13 in the
# Python that builds. The library itself is looked for when the first group needs it.
#
#   NVSHMEM_FOUND, NVSHMEM_INCLUDE_DIR, target NVSHMEM::headers
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util as u; s = u.find_spec('nvidia.nvshmem'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE _nvshmem_wheel ERROR_QUIET)
find_path(NVSHMEM_INCLUDE_DIR nvshmem_host.h
  HINTS "$ENV{NVSHMEM_HOME}/include" "${NVSHMEM_HOME}/include" "${_nvshmem_wheel}/include")
unset(_nvshmem_wheel)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NVSHMEM REQUIRED_VARS NVSHMEM_INCLUDE_DIR)
if(NVSHMEM_FOUND AND NOT TARGET NVSHMEM::headers)
  add_library(NVSHMEM::headers INTERFACE IMPORTED)
  set_target_properties(NVSHMEM::headers PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${NVSHMEM_INCLUDE_DIR}")
endif()
