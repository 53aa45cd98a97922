// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/mover_context.h"

#include <map>
#include <mutex>

#include "csrc/cuda/memory/allocation.h"

namespace smfree::cuda {

StatusOr<CUcontext> MoverContext(int32_t device) {
  static std::mutex& mutex = *new std::mutex;
  static auto& contexts = *new std::map<int32_t, CUcontext>;
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  const std::lock_guard<std::mutex> lock(mutex);
  CUcontext& context = contexts[device];
  if (context != nullptr) return context;
  const CUresult created = driver.value()->ctx_create(&context, 0, device);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) return OutOfMemory(device, kMoverContextBytes);
  const Status status = driver.value()->ToStatus(created, "cuCtxCreate");
  if (!status.ok()) return status;
  CUcontext popped = nullptr;  // what makes a context also makes it current
  (void)driver.value()->ctx_pop_current(&popped);
  return context;
}

StatusOr<CUcontext> PrimaryContext(int32_t device) {
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  CUcontext context = nullptr;  // never given back: XLA and NVSHMEM keep it, too
  const Status status = driver.value()->ToStatus(
      driver.value()->device_primary_ctx_retain(&context, device), "cuDevicePrimaryCtxRetain");
  if (!status.ok()) return status;
  return context;
}

}  // namespace smfree::cuda
