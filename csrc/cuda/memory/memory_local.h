// SPDX-License-Identifier: Apache-2.0
//
// The symmetric memory of a rank whose peers are GPUs of the same process: kernels and copy engines
// of all of them read and write it.
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
  // At least `bytes` on `device`, in whole pages, within reach of all `devices`. Freed at the end.
  static StatusOr<std::shared_ptr<LocalMemory>> Map(int32_t device,
                                                    const std::vector<int32_t>& devices,
                                                    size_t bytes);
  ~LocalMemory() override;

 private:
  explicit LocalMemory(const Driver& driver) : driver_(driver) {}
  Status MapPages(int32_t device, const std::vector<int32_t>& devices);
  CUdeviceptr address() const { return reinterpret_cast<CUdeviceptr>(data_); }

  const Driver& driver_;
  bool mapped_ = false;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_MEMORY_LOCAL_H_
