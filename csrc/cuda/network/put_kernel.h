// SPDX-License-Identifier: Apache-2.0
//
// The kernels of put_messages.cu: messages to other nodes that the GPU itself puts, in place of the
// mover. With IBGDA it rings the network card without a detour over the host.
#ifndef SMFREE_CSRC_CUDA_NETWORK_PUT_KERNEL_H_
#define SMFREE_CSRC_CUDA_NETWORK_PUT_KERNEL_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/cuda/driver/driver.h"
#include "csrc/cuda/network/nvshmem.h"
#include "csrc/cuda/host/state.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

constexpr unsigned int kPutThreads = 512;  // of a block, one for each message

struct ProcessOfRank {
  int32_t of_rank[kMaxRanks];
};

class PutKernel {
 public:
  // Whether this build has it: NVSHMEM's device library was there.
  static bool IsBuilt();
  // For groups of a rank on `device`; the module is loaded once per process.
  static StatusOr<std::unique_ptr<PutKernel>> Load(const Nvshmem& nvshmem, int32_t device,
                                                   const std::vector<int32_t>& process_of_rank);

  // Puts what the kernel before it on the stream has packed for far peers on the wire; and of a
  // large operation, first what it has announced.
  cudaError_t Launch(const KernelParams& params, cudaStream_t stream) const;

  struct Functions {
    CUfunction announcements, messages;
  };

 private:
  PutKernel(const Driver& driver, const Functions& functions, const ProcessOfRank& process)
      : driver_(driver), functions_(functions), process_(process) {}

  const Driver& driver_;
  const Functions functions_;
  const ProcessOfRank process_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_NETWORK_PUT_KERNEL_H_
