// SPDX-License-Identifier: Apache-2.0
//
// The calls of the CUDA driver for which the runtime has no equal. They are looked up when the
// first group is made: this module must load where there is no driver.
#ifndef SMFREE_CSRC_CUDA_DRIVER_DRIVER_H_
#define SMFREE_CSRC_CUDA_DRIVER_DRIVER_H_

#include <cudaTypedefs.h>

#include "csrc/core/status.h"

namespace smfree::cuda {

struct Driver {
  PFN_cuGetErrorString_v6000 get_error_string;
  PFN_cuCtxCreate_v3020 ctx_create;
  PFN_cuDevicePrimaryCtxRetain_v7000 device_primary_ctx_retain;
  PFN_cuCtxPushCurrent_v4000 ctx_push_current;
  PFN_cuCtxPopCurrent_v4000 ctx_pop_current;
  PFN_cuMemGetAllocationGranularity_v10020 mem_get_allocation_granularity;
  PFN_cuMemCreate_v10020 mem_create;
  PFN_cuMemRelease_v10020 mem_release;
  PFN_cuMemAddressReserve_v10020 mem_address_reserve;
  PFN_cuMemAddressFree_v10020 mem_address_free;
  PFN_cuMemMap_v10020 mem_map;
  PFN_cuMemUnmap_v10020 mem_unmap;
  PFN_cuMemSetAccess_v10020 mem_set_access;
  PFN_cuMemcpyDtoDAsync_v3020 memcpy_dtod_async;
  PFN_cuStreamWriteValue64_v11070 stream_write_value64;
  PFN_cuModuleLoadData_v2000 module_load_data;
  PFN_cuModuleGetFunction_v2000 module_get_function;
  PFN_cuLaunchKernel_v4000 launch_kernel;

  // Fails where there is no driver, or one that is too old.
  static StatusOr<const Driver*> Get();

  // What went wrong in the call `what`, or ok.
  Status ToStatus(CUresult result, const char* what) const;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_DRIVER_DRIVER_H_
