// SPDX-License-Identifier: Apache-2.0
//
// The symmetric memory of a rank whose peers are GPUs of the same process: kernels and copy engines
// of all of them read and write it. It grows in place: addresses are reserved for all that it may
// become, and pages come behind those that are there.
//
// It is mapped, not taken from cudaMalloc, because what is mapped belongs to no context: the movers
// have one of their own (mover_context.h).
#ifndef SMFREE_CSRC_CUDA_MEMORY_MEMORY_LOCAL_H_
#define SMFREE_CSRC_CUDA_MEMORY_MEMORY_LOCAL_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/cuda/driver/driver.h"
#include "csrc/cuda/memory/memory.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

class LocalMemory : public SymmetricMemory {
 public:
  // Addresses for `most_bytes` on `device`, within reach of all `devices`; no memory yet. Freed at
  // the end.
  static StatusOr<std::shared_ptr<LocalMemory>> Reserve(int32_t device,
                                                        const std::vector<int32_t>& devices,
                                                        size_t most_bytes);
  ~LocalMemory() override;

  // In whole pages.
  Status Grow(size_t bytes) override;

 private:
  LocalMemory(const Driver& driver, int32_t device, const std::vector<int32_t>& devices)
      : driver_(driver), device_(device), devices_(devices) {}
  Status ReserveAddresses(size_t most_bytes);
  CUdeviceptr address() const { return reinterpret_cast<CUdeviceptr>(data_); }

  const Driver& driver_;
  const int32_t device_;
  const std::vector<int32_t> devices_;
  size_t page_ = 0;
  size_t reserved_ = 0;
  std::vector<size_t> mappings_;  // their bytes, one behind the other
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_MEMORY_LOCAL_H_
