// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/memory/allocation.h"

#include <cstring>
#include <string>
#include <utility>

namespace smfree::cuda {

Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status(FaultKind::kSystem, std::string(what) + ": " + cudaGetErrorString(error));
}

Status OnOwnStream(int32_t device, const char* what,
                   const std::function<cudaError_t(cudaStream_t)>& work) {
  const DeviceScope scope(device);
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    error = work(stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
  return CudaStatus(error, what);
}

Status OutOfMemory(int32_t device, size_t bytes) {
  const DeviceScope scope(device);
  size_t free_bytes = 0, total_bytes = 0;
  (void)cudaMemGetInfo(&free_bytes, &total_bytes);
  // The driver also needs memory of the host, and has a limit of what many processes may share.
  const char* cure =
      free_bytes < bytes
          ? "Fix: lower EpConfig.max_tokens, num_lanes or num_sets; or let XLA preallocate less, "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 (default 0.75)."
          : "So it is CUDA's driver that is out of memory. Fix: run fewer processes on this host.";
  return Status(FaultKind::kOutOfMemory,
                "the group needs " + std::to_string(bytes) + " bytes on GPU " +
                    std::to_string(device) + ", " + std::to_string(free_bytes) + " of " +
                    std::to_string(total_bytes) + " are free. " + cure);
}

StatusOr<Allocation> Allocation::OnDevice(int32_t device, size_t bytes) {
  const DeviceScope scope(device);
  Allocation allocation;
  const cudaError_t error = cudaMalloc(&allocation.data_, bytes);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return OutOfMemory(device, bytes);
  }
  if (error != cudaSuccess) return CudaStatus(error, "cudaMalloc");
  allocation.bytes_ = bytes;
  allocation.device_ = device;
  const Status status = CudaStatus(cudaMemset(allocation.data_, 0, bytes), "cudaMemset");
  if (!status.ok()) return status;
  return allocation;
}

StatusOr<Allocation> Allocation::OnHost(size_t bytes) {
  Allocation allocation;
  const Status status = CudaStatus(
      cudaHostAlloc(&allocation.data_, bytes, cudaHostAllocPortable | cudaHostAllocMapped),
      "cudaHostAlloc");
  if (!status.ok()) return status;
  allocation.bytes_ = bytes;
  std::memset(allocation.data_, 0, bytes);
  return allocation;
}

Allocation& Allocation::operator=(Allocation&& other) noexcept {
  if (this == &other) return *this;
  Free();
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  device_ = other.device_;
  return *this;
}

void Allocation::Free() {
  if (data_ == nullptr) return;
  if (device_ < 0) {
    (void)cudaFreeHost(data_);
  } else {
    const DeviceScope scope(device_);
    (void)cudaFree(data_);
  }
  data_ = nullptr;
}

}  // namespace smfree::cuda
