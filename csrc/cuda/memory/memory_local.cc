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

CUmemAllocationProp PagesOn(int32_t device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = LocationOf(device);
  return properties;
}

}  // namespace

StatusOr<std::shared_ptr<LocalMemory>> LocalMemory::Reserve(int32_t device,
                                                            const std::vector<int32_t>& devices,
                                                            size_t most_bytes) {
  Status status = CheckReach(device, devices);
  if (!status.ok()) return status;
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  std::shared_ptr<LocalMemory> memory(new LocalMemory(*driver.value(), device, devices));
  status = memory->ReserveAddresses(most_bytes);
  if (!status.ok()) return status;
  return memory;
}

Status LocalMemory::ReserveAddresses(size_t most_bytes) {
  const CUmemAllocationProp properties = PagesOn(device_);
  Status status = driver_.ToStatus(
      driver_.mem_get_allocation_granularity(&page_, &properties,
                                             CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
      "cuMemGetAllocationGranularity");
  if (!status.ok()) return status;
  reserved_ = (most_bytes + page_ - 1) / page_ * page_;
  CUdeviceptr reserved = 0;
  const CUresult result = driver_.mem_address_reserve(&reserved, reserved_, 0, 0, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return OutOfMemory(device_, reserved_);
  status = driver_.ToStatus(result, "cuMemAddressReserve");
  if (status.ok()) data_ = reinterpret_cast<char*>(reserved);
  return status;
}

Status LocalMemory::Grow(size_t bytes) {
  if (bytes <= bytes_) return {};
  const size_t added = (bytes - bytes_ + page_ - 1) / page_ * page_;
  const CUdeviceptr begin = address() + bytes_;
  const CUmemAllocationProp properties = PagesOn(device_);
  CUmemGenericAllocationHandle pages{};
  const CUresult created = driver_.mem_create(&pages, added, &properties, 0);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) return OutOfMemory(device_, added);
  Status status = driver_.ToStatus(created, "cuMemCreate");
  if (!status.ok()) return status;
  status = driver_.ToStatus(driver_.mem_map(begin, added, 0, pages, 0), "cuMemMap");
  (void)driver_.mem_release(pages);  // the mapping keeps them
  if (!status.ok()) return status;
  std::vector<CUmemAccessDesc> access;
  for (const int32_t peer : devices_) {
    access.push_back({LocationOf(peer), CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  }
  status = driver_.ToStatus(
      driver_.mem_set_access(begin, added, access.data(), access.size()), "cuMemSetAccess");
  if (status.ok()) {
    status = OnOwnStream(device_, "setting new memory to zero", [&](cudaStream_t stream) {
      return cudaMemsetAsync(data_ + bytes_, 0, added, stream);
    });
  }
  if (!status.ok()) {
    (void)driver_.mem_unmap(begin, added);
    return status;
  }
  mappings_.push_back(added);
  bytes_ += added;
  return {};
}

LocalMemory::~LocalMemory() {
  CUdeviceptr at = address();
  for (const size_t bytes : mappings_) {
    (void)driver_.mem_unmap(at, bytes);
    at += bytes;
  }
  if (data_ != nullptr) (void)driver_.mem_address_free(address(), reserved_);
}

}  // namespace smfree::cuda
