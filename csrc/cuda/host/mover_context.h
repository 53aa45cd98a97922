// SPDX-License-Identifier: Apache-2.0
//
// The CUDA context in which the movers of a device work.
//
// It is not the one that XLA's kernels run in. While another thread loads a module into a context or
// frees memory of it, the driver waits until all kernels there have ended, and admits no other call
// meanwhile: no copy either. Were one of these kernels a recv, it would wait for rows that the mover
// of a peer cannot move, because that context waits for a recv, too, until the deadline. A context
// of the movers' own is never held up so, as long as what it copies does not belong to the other one
// (memory_local.h).
#ifndef SMFREE_CSRC_CUDA_HOST_MOVER_CONTEXT_H_
#define SMFREE_CSRC_CUDA_HOST_MOVER_CONTEXT_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/driver/driver.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

// What one takes of a GPU's memory, about.
constexpr size_t kMoverContextBytes = size_t{600} << 20;

// One per device, for all groups. Made when first asked for and kept until the process ends: it
// takes half a gigabyte of the GPU and a tenth of a second to make.
StatusOr<CUcontext> MoverContext(int32_t device);

// That of XLA's kernels, and of NVSHMEM.
StatusOr<CUcontext> PrimaryContext(int32_t device);

// Makes one current for this thread, for a while: all calls of the runtime then mean it.
class ContextScope {
 public:
  ContextScope(const Driver& driver, CUcontext context) : driver_(driver) {
    (void)driver_.ctx_push_current(context);
  }
  ~ContextScope() {
    CUcontext popped = nullptr;
    (void)driver_.ctx_pop_current(&popped);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_MOVER_CONTEXT_H_
