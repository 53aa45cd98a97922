// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/memory/memory_nvshmem.h"

#include "csrc/cuda/memory/allocation.h"

namespace smfree::cuda {

StatusOr<std::shared_ptr<NvshmemMemory>> NvshmemMemory::Allocate(const Nvshmem& nvshmem,
                                                                 int32_t device, size_t bytes) {
  const DeviceScope scope(device);
  char* const data = nvshmem.Allocate(bytes);
  if (data == nullptr) return OutOfMemory(device, bytes);
  return std::shared_ptr<NvshmemMemory>(new NvshmemMemory(nvshmem, data, bytes));
}

}  // namespace smfree::cuda
