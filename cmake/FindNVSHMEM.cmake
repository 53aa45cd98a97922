# SPDX-License-Identifier: Apache-2.0
#
# NVSHMEM's device library, of the wheel nvidia-nvshmem-cu12 or -cu13 in the Python environment, or
# under NVSHMEM_ROOT. Sets NVSHMEM_FOUND, NVSHMEM_INCLUDE_DIR, NVSHMEM_DEVICE_LIBRARY and
# NVSHMEM_VERSION. The host library is not linked: see csrc/cuda/network/nvshmem.h.
find_package(Python 3.11 QUIET COMPONENTS Interpreter)
if(Python_SITELIB)
  set(nvshmem_wheel "${Python_SITELIB}/nvidia/nvshmem")
endif()
find_path(NVSHMEM_INCLUDE_DIR nvshmem.h HINTS "${nvshmem_wheel}" PATH_SUFFIXES include)
find_library(NVSHMEM_DEVICE_LIBRARY libnvshmem_device.a HINTS "${nvshmem_wheel}" PATH_SUFFIXES lib)
mark_as_advanced(NVSHMEM_INCLUDE_DIR NVSHMEM_DEVICE_LIBRARY)
set(nvshmem_version_h "${NVSHMEM_INCLUDE_DIR}/non_abi/nvshmem_version.h")
if(EXISTS "${nvshmem_version_h}")
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${nvshmem_version_h}" line REGEX "define NVSHMEM_VENDOR_${part}_VERSION ")
    string(REGEX MATCH "[0-9]+$" nvshmem_${part} "${line}")
  endforeach()
  set(NVSHMEM_VERSION "${nvshmem_MAJOR}.${nvshmem_MINOR}.${nvshmem_PATCH}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NVSHMEM
  REQUIRED_VARS NVSHMEM_INCLUDE_DIR NVSHMEM_DEVICE_LIBRARY VERSION_VAR NVSHMEM_VERSION)
