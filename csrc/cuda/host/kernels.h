// SPDX-License-Identifier: Apache-2.0
//
// Between the phases (host functions that know the group) and their kernels: one function per phase
// that loads its kernels and one that launches them, and the same for the relays.
#ifndef SMFREE_CSRC_CUDA_HOST_KERNELS_H_
#define SMFREE_CSRC_CUDA_HOST_KERNELS_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "csrc/cuda/host/small.h"
#include "csrc/cuda/host/state.h"

namespace smfree::cuda {

constexpr int32_t kRouteRows = 256;       // of a block of dispatch_send's Route, at least
constexpr int32_t kMaxRouteBlocks = 32;   // and no more than SMs; else more rows per block
constexpr int32_t kRouteThreads = 1024;

constexpr int32_t kThreads = 512;  // of a block, but for Route
constexpr int32_t kPlacedRows = 256;  // of a block that places rows (places.cuh)
// Resident at once, which kernels rely on where blocks wait for one another.
constexpr int32_t kBlocksPerSm = 2;

struct LaunchParams {
  cudaStream_t stream;
  int32_t num_sms;
  bool fused;  // one kernel for the phase, where there is one (small.h)

  // For a kernel with a warp per item.
  int32_t BlocksFor(int64_t warps) const { return Blocks(warps, kThreads / 32); }
  // With a thread per item.
  int32_t BlocksForItems(int64_t items) const { return Blocks(items, kThreads); }
  // That place rows.
  SMFREE_HD static constexpr int32_t BlocksForPlaces(int32_t rows) {
    return (rows + kPlacedRows - 1) / kPlacedRows;
  }

 private:
  int32_t Blocks(int64_t items, int64_t per_block) const {
    return static_cast<int32_t>(std::clamp<int64_t>((items + per_block - 1) / per_block, 1,
                                                    int64_t{num_sms} * kBlocksPerSm));
  }
};

// Launches a kernel. Says what went wrong in this very launch: cudaGetLastError would also tell of
// earlier calls, which may be others'.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), int32_t blocks, int32_t threads,
                         size_t shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  const auto launch = [&](Parameters... parameters) {
    void* pointers[] = {&parameters...};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(blocks));
    config.blockDim = dim3(static_cast<unsigned int>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
  };
  const cudaError_t error = launch(arguments...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is told here, and to nobody else
  return error;
}

// A kernel has to be on the device before its first launch: loading it then could wait for the
// whole device, and with it for a recv that waits for a peer.
struct Kernel {
  const void* function;
  size_t shared_bytes;
  template <typename... Args>
  explicit Kernel(void (*kernel)(Args...), size_t dynamic_shared_bytes = 0)
      : function(reinterpret_cast<const void*>(kernel)), shared_bytes(dynamic_shared_bytes) {}
};
inline cudaError_t LoadKernels(std::initializer_list<Kernel> kernels) {
  for (const Kernel& kernel : kernels) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    // Groups share the kernels: the limit is only ever raised.
    if (error == cudaSuccess &&
        kernel.shared_bytes > static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kernel.shared_bytes));
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

size_t RouteSharedBytes(int64_t tokens, int32_t bins, int32_t num_sms);
size_t PlaceSharedBytes(int32_t num_experts, int32_t num_ranks);

cudaError_t LoadDispatchSend(size_t route_shared_bytes);
cudaError_t LoadDispatchRecv(size_t place_shared_bytes);
cudaError_t LoadCombineSend();
cudaError_t LoadCombineRecv();
cudaError_t LoadDispatchRelay();
cudaError_t LoadCombineRelay();
cudaError_t LoadReadClock();

// Each returns at the first launch that fails.
cudaError_t LaunchDispatchSend(const KernelParams& k, const DispatchSendArrays& arrays,
                               const LaunchParams& launch);
cudaError_t LaunchDispatchSendCached(const KernelParams& k, const DispatchSendCachedArrays& arrays,
                                     const LaunchParams& launch);
cudaError_t LaunchDispatchRecv(const KernelParams& k, const DispatchRecvArrays& arrays,
                               const LaunchParams& launch);
cudaError_t LaunchDispatchRecvCached(const KernelParams& k, const DispatchRecvCachedArrays& arrays,
                                     const LaunchParams& launch);
cudaError_t LaunchCombineSend(const KernelParams& k, const CombineSendArrays& arrays,
                              const LaunchParams& launch);
cudaError_t LaunchCombineRecv(const KernelParams& k, const CombineRecvArrays& arrays,
                              const LaunchParams& launch);
// The relays of hierarchical mode: the first part of a dispatch_recv, the last of a combine_send.
cudaError_t LaunchDispatchRelay(const KernelParams& k, const DispatchRecvArrays& arrays,
                                const LaunchParams& launch);
cudaError_t LaunchDispatchRelayCached(const KernelParams& k, const DispatchRecvCachedArrays& arrays,
                                      const LaunchParams& launch);
cudaError_t LaunchCombineRelay(const KernelParams& k, const CombineSendArrays& arrays,
                               const LaunchParams& launch);
cudaError_t LaunchReadClock(int64_t* now, cudaStream_t stream);  // `now` may be pinned host memory

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_KERNELS_H_
