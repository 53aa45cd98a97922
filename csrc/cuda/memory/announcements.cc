// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/memory/announcements.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "csrc/cuda/memory/allocation.h"

namespace smfree::cuda {
namespace {

Status SystemStatus(const char* what, const std::string& name) {
  return Status(FaultKind::kSystem, std::string(what) + " of /dev/shm" + name + ": " +
                                        std::strerror(errno) +
                                        ". Fix: give /dev/shm more room, such as "
                                        "docker run --shm-size=1g.");
}

// A file of zeros that the processes of this host map; whoever comes first makes it.
StatusOr<void*> MapFile(const std::string& name, size_t bytes) {
  const int file = shm_open(name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
  if (file < 0) return SystemStatus("shm_open", name);
  // Allocated now: a page that is missing later would end the process.
  const int error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
  void* memory = MAP_FAILED;
  if (error == 0) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  } else {
    errno = error;
  }
  const Status failed = memory == MAP_FAILED ? SystemStatus("mmap", name) : Status();
  (void)close(file);
  if (!failed.ok()) return failed;
  return memory;
}

}  // namespace

StatusOr<Announcements> Announcements::Map(size_t bytes, const std::string& name) {
  Announcements made;
  cudaError_t error = cudaSuccess;
  if (name.empty()) {
    void* memory = nullptr;
    error = cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    if (error == cudaSuccess) std::memset(memory, 0, bytes);
    made.on_host_ = static_cast<uint64_t*>(memory);
  } else {
    auto memory = MapFile(name, bytes);
    made.name_ = name;  // also if it failed: whoever made the file removes its name
    if (!memory.ok()) return memory.status();
    made.is_file_ = true;
    made.on_host_ = static_cast<uint64_t*>(memory.value());
    error = cudaHostRegister(made.on_host_, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  }
  made.bytes_ = bytes;
  void* on_device = nullptr;
  if (error == cudaSuccess) error = cudaHostGetDevicePointer(&on_device, made.on_host_, 0);
  made.on_device_ = static_cast<uint64_t*>(on_device);
  const Status status = CudaStatus(error, "pinned memory for announcements");
  if (!status.ok()) return status;
  return made;
}

Announcements& Announcements::operator=(Announcements&& other) noexcept {
  if (this == &other) return *this;
  Unmap();
  on_host_ = std::exchange(other.on_host_, nullptr);
  on_device_ = std::exchange(other.on_device_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  name_ = std::exchange(other.name_, "");
  is_file_ = other.is_file_;
  return *this;
}

void Announcements::Unname() {
  if (!name_.empty()) (void)shm_unlink(name_.c_str());
  name_.clear();
}

void Announcements::Unmap() {
  Unname();
  if (on_host_ == nullptr) return;
  if (is_file_) {
    (void)cudaHostUnregister(on_host_);
    (void)munmap(on_host_, bytes_);
  } else {
    (void)cudaFreeHost(on_host_);
  }
  on_host_ = nullptr;
}

}  // namespace smfree::cuda
