// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/memory/memory_local.h"

#include <cuda_runtime_api.h>

#include <string>

#include "csrc/cuda/memory/allocation.h"

namespace smfree::cuda {
namespace {

Status CheckReach(int32_t device, const std::vector<int32_t>& devices) {
  for (const int32_t peer : devices) {
    int reached = peer == device;
    if (!reached) {
      const Status status = CudaStatus(cudaDeviceCanAccessPeer(&reached, peer, device),
                                       "cudaDeviceCanAccessPeer");
      if (!status.ok()) return status;
    }
    if (!reached) {
      return Status(FaultKind::kInvalidArgument,
                    "GPU " + std::to_string(peer) + " cannot reach the memory of GPU " +
                        std::to_string(device) +
                        " (no NVLink or PCIe peer access between them). Fix: make the group of "
                        "GPUs that can (nvidia-smi topo -p2p r shows it).");
    }
  }
  return {};
}

CUmemLocation LocationOf(int32_t device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

}  // namespace

StatusOr<std::shared_ptr<LocalMemory>> LocalMemory::Map(int32_t device,
                                                        const std::vector<int32_t>& devices,
                                                        size_t bytes) {
  Status status = CheckReach(device, devices);
  if (!status.ok()) return status;
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  std::shared_ptr<LocalMemory> memory(new LocalMemory(*driver.value()));
  memory->bytes_ = bytes;
  status = memory->MapPages(device, devices);
  if (!status.ok()) return status;
  return memory;
}

Status LocalMemory::MapPages(int32_t device, const std::vector<int32_t>& devices) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = LocationOf(device);
  size_t page = 0;
  Status status = driver_.ToStatus(
      driver_.mem_get_allocation_granularity(&page, &properties,
                                             CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
      "cuMemGetAllocationGranularity");
  if (!status.ok()) return status;
  bytes_ = (bytes_ + page - 1) / page * page;

  CUmemGenericAllocationHandle pages{};
  const CUresult created = driver_.mem_create(&pages, bytes_, &properties, 0);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) return OutOfMemory(device, bytes_);
  status = driver_.ToStatus(created, "cuMemCreate");
  if (!status.ok()) return status;
  CUdeviceptr reserved = 0;
  status = driver_.ToStatus(driver_.mem_address_reserve(&reserved, bytes_, 0, 0, 0),
                            "cuMemAddressReserve");
  if (status.ok()) {
    data_ = reinterpret_cast<char*>(reserved);
    status = driver_.ToStatus(driver_.mem_map(reserved, bytes_, 0, pages, 0), "cuMemMap");
    mapped_ = status.ok();
  }
  (void)driver_.mem_release(pages);  // the mapping keeps them
  if (!status.ok()) return status;

  std::vector<CUmemAccessDesc> access;
  for (const int32_t peer : devices) {
    access.push_back({LocationOf(peer), CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  }
  return driver_.ToStatus(
      driver_.mem_set_access(address(), bytes_, access.data(), access.size()), "cuMemSetAccess");
}

LocalMemory::~LocalMemory() {
  if (mapped_) (void)driver_.mem_unmap(address(), bytes_);
  if (data_ != nullptr) (void)driver_.mem_address_free(address(), bytes_);
}

}  // namespace smfree::cuda
