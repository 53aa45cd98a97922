// SPDX-License-Identifier: Apache-2.0
//
// Memory of a rank that no other rank reaches, on its device and pinned.
#ifndef SMFREE_CSRC_CUDA_MEMORY_ALLOCATION_H_
#define SMFREE_CSRC_CUDA_MEMORY_ALLOCATION_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "csrc/core/status.h"

namespace smfree::cuda {

// Makes `device` current for this thread, for a while.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    (void)cudaGetDevice(&before_);
    (void)cudaSetDevice(device);
  }
  ~DeviceScope() { (void)cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

// What went wrong in a CUDA call, or ok.
Status CudaStatus(cudaError_t error, const char* what);

// Does `work(stream)` and waits for it, but not for kernels of other streams.
Status OnOwnStream(int32_t device, const char* what,
                   const std::function<cudaError_t(cudaStream_t)>& work);

// `device` has no room for `bytes` more.
Status OutOfMemory(int32_t device, size_t bytes);

// Zeroed device memory, or pinned host memory that all devices map; freed at the end.
class Allocation {
 public:
  static StatusOr<Allocation> OnDevice(int32_t device, size_t bytes);
  static StatusOr<Allocation> OnHost(size_t bytes);
  Allocation() = default;
  Allocation(Allocation&& other) noexcept { *this = std::move(other); }
  Allocation& operator=(Allocation&& other) noexcept;
  ~Allocation() { Free(); }

  template <typename T>
  T* as() const { return static_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void Free();

  void* data_ = nullptr;
  size_t bytes_ = 0;
  int32_t device_ = -1;  // -1: host
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_ALLOCATION_H_
