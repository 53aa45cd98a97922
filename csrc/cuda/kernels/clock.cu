// SPDX-License-Identifier: Apache-2.0
//
// ReadClock: *now = the device's time, on the clock of the trace.
//
// Launch: one thread.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {
namespace {

__global__ void ReadClock(int64_t* now) { *now = NowNs(); }

}  // namespace

cudaError_t LoadReadClock() { return LoadKernels({Kernel(ReadClock)}); }

cudaError_t LaunchReadClock(int64_t* now, cudaStream_t stream) {
  return LaunchKernel(ReadClock, 1, 1, 0, stream, now);
}

}  // namespace smfree::cuda
