// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/processes/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "csrc/cpu/processes/pages.h"
#include "csrc/cpu/processes/system_error.h"
#include "csrc/protocol/layout.h"

namespace smfree::cpu {
namespace {

// Blocks are whole pages; segments, and what is claimed of them at a time, whole huge pages.
constexpr int64_t kSegmentBytes = 256 << 20;  // address space only: pages come when first used

Status MemoryError(const std::string& what, int64_t bytes, int error) {
  const std::string mib = what + " of " + std::to_string(bytes >> 20) + " MiB for rows in flight";
  if (IsOutOfDescriptors(error)) return SystemError(mib, error);
  return Status(FaultKind::kOutOfMemory,
                mib + " failed: " + std::strerror(error) +
                    ". Fix: send fewer rows per operation (max_tokens), keep fewer operations in "
                    "flight (lanes), or give the process more memory.");
}

}  // namespace

StatusOr<std::shared_ptr<Mapping>> Mapping::Create(int fd, int64_t bytes, bool writable) {
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* data = mmap(nullptr, static_cast<size_t>(bytes), protection, flags, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    if (fd >= 0) close(fd);
    return MemoryError("mapping", bytes, error);
  }
  AdviseHugePages(data, bytes);
  return std::shared_ptr<Mapping>(new Mapping(static_cast<std::byte*>(data), bytes, fd));
}

Mapping::~Mapping() {
  munmap(data_, static_cast<size_t>(bytes_));
  if (fd_ >= 0) close(fd_);
}

StatusOr<std::shared_ptr<Mapping>> MapForeignSegment(int fd, int64_t bytes) {
  struct stat file{};
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &file) != 0 || bytes <= 0 ||
      file.st_size < bytes) {
    close(fd);
    return Status(FaultKind::kSystem, "a peer process sent memory that is not a sealed memfd");
  }
  return Mapping::Create(fd, bytes, /*writable=*/false);
}

Status Arena::AddSegment(int64_t bytes) {
  const int64_t size = std::max(kSegmentBytes, AlignUp(bytes, kHugePageBytes));
  int fd = -1;
  if (backing_ == Backing::kMemfd) {
    fd = memfd_create("smfree", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return MemoryError("memfd", size, errno);
    if (ftruncate(fd, size) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
      const int error = errno;
      close(fd);
      return MemoryError("sizing a memfd", size, error);
    }
  }
  auto mapping = Mapping::Create(fd, size, /*writable=*/true);
  if (!mapping.ok()) return mapping.status();
  Segment segment;
  segment.mapping = std::move(mapping.value());
  segment.free.emplace(0, size);
  segments_.push_back(std::move(segment));
  if (on_segment_) {
    on_segment_(static_cast<int32_t>(segments_.size()) - 1, *segments_.back().mapping);
  }
  return Status();
}

// Pages of a memfd are claimed before they are written: without this, running out of memory would
// be a SIGBUS in the middle of packing instead of an error.
Status Arena::Commit(Segment& segment, int64_t end) {
  if (end <= segment.committed) return Status();
  const int64_t target = std::min(AlignUp(end, kHugePageBytes), segment.mapping->bytes());
  const int64_t bytes = target - segment.committed;
  if (backing_ == Backing::kMemfd) {
    int error;
    do {
      error = posix_fallocate(segment.mapping->fd(), segment.committed, bytes);
    } while (error == EINTR);
    if (error != 0) return MemoryError("claiming", bytes, error);
  }
  segment.committed = target;
  return Status();
}

bool Arena::TakeLowest(Segment& segment, int64_t bytes, int64_t* offset) {
  for (auto it = segment.free.begin(); it != segment.free.end(); ++it) {
    const auto [free_offset, free_bytes] = *it;
    if (free_bytes < bytes) continue;
    segment.free.erase(it);
    if (free_bytes > bytes) segment.free.emplace(free_offset + bytes, free_bytes - bytes);
    *offset = free_offset;
    return true;
  }
  return false;
}

StatusOr<std::shared_ptr<Arena::Block>> Arena::Allocate(int64_t bytes) {
  bytes = AlignUp(std::max<int64_t>(bytes, 1), kPageBytes);
  std::unique_lock<std::mutex> lock(mutex_);
  if (retired_) return Status(FaultKind::kClosed, "the group was closed");
  int64_t offset = 0;
  size_t index = 0;
  while (index < segments_.size() && !TakeLowest(segments_[index], bytes, &offset)) ++index;
  if (index == segments_.size()) {
    Status status = AddSegment(bytes);
    if (!status.ok()) return status;
    TakeLowest(segments_[index], bytes, &offset);
  }
  in_use_ += bytes;
  const Status committed = Commit(segments_[index], offset + bytes);
  std::byte* const data = segments_[index].mapping->data() + offset;
  if (!committed.ok()) {
    lock.unlock();
    Free(static_cast<int32_t>(index), offset, bytes);
    return committed;
  }
  high_water_ = std::max(high_water_, in_use_);
  return std::make_shared<Block>(shared_from_this(), static_cast<int32_t>(index), offset, bytes,
                                 data);
}

void Arena::Free(int32_t index, int64_t offset, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_use_ -= bytes;
  auto& free = segments_[static_cast<size_t>(index)].free;
  const auto next = free.lower_bound(offset);
  if (next != free.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      free.erase(previous);
    }
  }
  if (next != free.end() && offset + bytes == next->first) {
    bytes += next->second;
    free.erase(next);
  }
  free.emplace(offset, bytes);
}

void Arena::Retire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  retired_ = true;
}

int64_t Arena::bytes_in_use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

int64_t Arena::high_water() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return high_water_;
}

int64_t Arena::committed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const Segment& segment : segments_) bytes += segment.committed;
  return bytes;
}

}  // namespace smfree::cpu
