// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/driver/visible.h"

#include <cuda_runtime_api.h>

#include "csrc/cuda/memory/allocation.h"

namespace smfree::cuda {

StatusOr<std::string> BusId(int32_t device) {
  char id[32] = {};
  const Status status =
      CudaStatus(cudaDeviceGetPCIBusId(id, sizeof(id), device), "cudaDeviceGetPCIBusId");
  if (!status.ok()) return status;
  return std::string(id);
}

bool IsVisible(const std::string& bus_id) {
  int device = 0;
  const bool found = cudaDeviceGetByPCIBusId(&device, bus_id.c_str()) == cudaSuccess;
  if (!found) (void)cudaGetLastError();
  return found;
}

}  // namespace smfree::cuda
