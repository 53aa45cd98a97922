// SPDX-License-Identifier: Apache-2.0
//
// The symmetric memory of a rank whose peers are GPUs of the same process: kernels and copy engines
// of all of them read and write it.
//
// It is mapped, not taken from cudaMalloc, because what is mapped belongs to no context: the movers
// have one of their own (mover_context.h).
#ifndef SMFREE_CSRC_CUDA_MEMORY_LOCAL_H_
#define SMFREE_CSRC_CUDA_MEMORY_LOCAL_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "csrc/cuda/driver.h"
#include "csrc/protocol/status.h"

namespace smfree::cuda {

class LocalMemory {
 public:
  // At least `bytes` on `device`, zeroed, within reach of all `devices`. Freed at the end.
  static StatusOr<LocalMemory> Map(int32_t device, const std::vector<int32_t>& devices,
                                   size_t bytes);
  LocalMemory() = default;
  LocalMemory(LocalMemory&& other) noexcept { *this = std::move(other); }
  LocalMemory& operator=(LocalMemory&& other) noexcept;
  ~LocalMemory() { Free(); }

  char* data() const { return reinterpret_cast<char*>(address_); }
  size_t bytes() const { return bytes_; }  // whole pages

 private:
  Status MapPages(int32_t device, const std::vector<int32_t>& devices);
  void Free();

  const Driver* driver_ = nullptr;
  size_t bytes_ = 0;
  CUdeviceptr address_ = 0;
  bool mapped_ = false;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_LOCAL_H_
