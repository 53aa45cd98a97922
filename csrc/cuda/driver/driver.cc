// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/driver/driver.h"

#include <cuda_runtime_api.h>

#include <string>

namespace smfree::cuda {
namespace {

// `version` as cuda.h counts them: 11070 is 11.7. Each version of a call has a type of its own.
template <typename Function>
bool Find(const char* name, unsigned int version, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &address, version, cudaEnableDefault, &found);
  function = reinterpret_cast<Function>(address);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess;
}

bool FindAll(Driver& d) {
  return Find("cuGetErrorString", 6000, d.get_error_string) &&
         Find("cuCtxCreate", 3020, d.ctx_create) &&
         Find("cuDevicePrimaryCtxRetain", 7000, d.device_primary_ctx_retain) &&
         Find("cuCtxPushCurrent", 4000, d.ctx_push_current) &&
         Find("cuCtxPopCurrent", 4000, d.ctx_pop_current) &&
         Find("cuMemGetAllocationGranularity", 10020, d.mem_get_allocation_granularity) &&
         Find("cuMemCreate", 10020, d.mem_create) && Find("cuMemRelease", 10020, d.mem_release) &&
         Find("cuMemAddressReserve", 10020, d.mem_address_reserve) &&
         Find("cuMemAddressFree", 10020, d.mem_address_free) &&
         Find("cuMemMap", 10020, d.mem_map) && Find("cuMemUnmap", 10020, d.mem_unmap) &&
         Find("cuMemSetAccess", 10020, d.mem_set_access) &&
         Find("cuMemcpyDtoDAsync", 3020, d.memcpy_dtod_async) &&
         Find("cuStreamWriteValue64", 11070, d.stream_write_value64) &&
         Find("cuModuleLoadData", 2000, d.module_load_data) &&
         Find("cuModuleGetFunction", 2000, d.module_get_function) &&
         Find("cuLaunchKernel", 4000, d.launch_kernel);
}

}  // namespace

StatusOr<const Driver*> Driver::Get() {
  static Driver driver{};
  static const bool found = FindAll(driver);
  if (found) return &driver;
  return Status(FaultKind::kSystem,
                "the CUDA driver lacks a call that this needs. Fix: driver 525 or newer.");
}

Status Driver::ToStatus(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return {};
  const char* text = nullptr;
  if (get_error_string(result, &text) != CUDA_SUCCESS) text = "unknown error";
  return Status(FaultKind::kSystem, std::string(what) + ": " + text);
}

}  // namespace smfree::cuda
