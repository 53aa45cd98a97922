// SPDX-License-Identifier: Apache-2.0
//
// The symmetric memory of a rank whose peers are in other processes: a block of NVSHMEM's heap, at
// the same offset in all of them.
//
// NVSHMEM frees with a barrier, and a group is closed without one. So blocks are kept, and serve
// later groups once no process uses them any more (jax_smfree/_src/nvshmem.py).
#ifndef SMFREE_CSRC_CUDA_MEMORY_MEMORY_NVSHMEM_H_
#define SMFREE_CSRC_CUDA_MEMORY_MEMORY_NVSHMEM_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "csrc/cuda/memory/memory.h"
#include "csrc/cuda/network/nvshmem.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

class NvshmemMemory : public SymmetricMemory {
 public:
  // On `device`, which has joined; collective over the world.
  static StatusOr<std::shared_ptr<NvshmemMemory>> Allocate(const Nvshmem& nvshmem, int32_t device,
                                                           size_t bytes);

  // The block of `process`, as this one reaches it; nullptr if not by NVLink.
  char* At(int32_t process) const { return nvshmem_.At(data_, process); }
  const Nvshmem& nvshmem() const { return nvshmem_; }

  // By a group of this process.
  std::atomic<bool> in_use{false};

 private:
  NvshmemMemory(const Nvshmem& nvshmem, char* data, size_t bytes) : nvshmem_(nvshmem) {
    data_ = data;
    bytes_ = bytes;
  }
  const Nvshmem& nvshmem_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_MEMORY_NVSHMEM_H_
