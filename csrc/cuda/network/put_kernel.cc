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

// The functions on the GPU of this process, which has one for NVSHMEM.
StatusOr<PutKernel::Functions> LoadOnce(const Driver& driver, const Nvshmem& nvshmem,
                                        int32_t device) {
  static std::mutex& mutex = *new std::mutex;
  static PutKernel::Functions functions{};
  const std::lock_guard<std::mutex> lock(mutex);
  if (functions.messages != nullptr) return functions;
  auto context = PrimaryContext(device);
  if (!context.ok()) return context.status();
  const ContextScope scope(driver, context.value());
  CUmodule module = nullptr;
  Status status = driver.ToStatus(driver.module_load_data(&module, Module()), "cuModuleLoadData");
  if (status.ok()) status = nvshmem.InitModule(module);
  const auto find = [&](CUfunction& found, const char* name) {
    if (!status.ok()) return;
    status = driver.ToStatus(driver.module_get_function(&found, module, name),
                             "cuModuleGetFunction");
  };
  PutKernel::Functions found{};
  find(found.announcements, "smfree_put_announcements");
  find(found.messages, "smfree_put_messages");
  if (!status.ok()) return status;
  functions = found;
  return functions;
}

}  // namespace

bool PutKernel::IsBuilt() { return Module() != nullptr; }

StatusOr<std::unique_ptr<PutKernel>> PutKernel::Load(const Nvshmem& nvshmem, int32_t device,
                                                     const std::vector<int32_t>& process_of_rank) {
  if (!IsBuilt()) {
    return Status(FaultKind::kInvalidArgument,
                  "puts by the GPU need NVSHMEM's device library, and this build has none. Fix: "
                  "pip install nvidia-nvshmem-cu13 (or -cu12) before building, or "
                  "EpConfig(puts='host').");
  }
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  auto functions = LoadOnce(*driver.value(), nvshmem, device);
  if (!functions.ok()) return functions.status();
  ProcessOfRank process{};
  std::copy(process_of_rank.begin(), process_of_rank.end(), process.of_rank);
  return std::unique_ptr<PutKernel>(new PutKernel(*driver.value(), functions.value(), process));
}

cudaError_t PutKernel::Launch(const KernelParams& params, cudaStream_t stream) const {
  KernelParams k = params;
  ProcessOfRank process = process_;
  void* arguments[] = {&k, &process};
  const auto blocks = static_cast<unsigned int>(k.g.nodes.Regions(kWire));
  const auto launch = [&](CUfunction function) {
    return driver_.launch_kernel(function, blocks, 1, 1, kPutThreads, 1, 1, /*shared=*/0, stream,
                                 arguments, nullptr);
  };
  CUresult result = k.op.in_areas ? launch(functions_.announcements) : CUDA_SUCCESS;
  if (result == CUDA_SUCCESS) result = launch(functions_.messages);
  return static_cast<cudaError_t>(result);  // one set of numbers
}

}  // namespace smfree::cuda
