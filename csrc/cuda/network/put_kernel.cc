// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/put_kernel.h"

#include <algorithm>
#include <mutex>

#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/host/mover_context.h"

// The module, as CMake has linked it.
#ifdef SMFREE_PUT_MESSAGES_FATBIN
asm(".pushsection .rodata\n"
    ".balign 16\n"
    "smfree_put_messages_fatbin:\n"
    ".incbin \"" SMFREE_PUT_MESSAGES_FATBIN "\"\n"
    ".popsection\n");
extern "C" const char smfree_put_messages_fatbin[] __attribute__((visibility("hidden")));
#endif

namespace smfree::cuda {
namespace {

#ifdef SMFREE_PUT_MESSAGES_FATBIN
const char* Module() { return smfree_put_messages_fatbin; }
#else
const char* Module() { return nullptr; }
#endif

// The function on the GPU of this process, which has one for NVSHMEM.
StatusOr<CUfunction> LoadOnce(const Driver& driver, const Nvshmem& nvshmem, int32_t device) {
  static std::mutex& mutex = *new std::mutex;
  static CUfunction function = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (function != nullptr) return function;
  auto context = PrimaryContext(device);
  if (!context.ok()) return context.status();
  const ContextScope scope(driver, context.value());
  CUmodule module = nullptr;
  Status status = driver.ToStatus(driver.module_load_data(&module, Module()), "cuModuleLoadData");
  if (status.ok()) status = nvshmem.InitModule(module);
  CUfunction found = nullptr;
  if (status.ok()) {
    status = driver.ToStatus(driver.module_get_function(&found, module, "smfree_put_messages"),
                             "cuModuleGetFunction");
  }
  if (!status.ok()) return status;
  function = found;
  return function;
}

}  // namespace

bool PutKernel::IsBuilt() { return Module() != nullptr; }

StatusOr<std::unique_ptr<PutKernel>> PutKernel::Load(const Nvshmem& nvshmem, int32_t device,
                                                     const std::vector<int32_t>& process_of_rank) {
  if (!IsBuilt()) {
    return Status(FaultKind::kInvalidArgument,
                  "puts by the GPU need NVSHMEM's device library, and this build has none. Cure: "
                  "pip install nvidia-nvshmem-cu13 (or -cu12) before building, or "
                  "EpConfig(puts='host').");
  }
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  auto function = LoadOnce(*driver.value(), nvshmem, device);
  if (!function.ok()) return function.status();
  ProcessOfRank process{};
  std::copy(process_of_rank.begin(), process_of_rank.end(), process.of_rank);
  return std::unique_ptr<PutKernel>(new PutKernel(*driver.value(), function.value(), process));
}

cudaError_t PutKernel::Launch(const KernelParams& params, cudaStream_t stream) const {
  KernelParams k = params;
  ProcessOfRank process = process_;
  void* arguments[] = {&k, &process};
  const auto blocks = static_cast<unsigned int>(k.g.nodes.Regions(kWire));
  const CUresult result = driver_.launch_kernel(function_, blocks, 1, 1, kPutThreads, 1, 1,
                                                /*shared=*/0, stream, arguments, nullptr);
  return static_cast<cudaError_t>(result);  // one set of numbers
}

}  // namespace smfree::cuda
