// SPDX-License-Identifier: Apache-2.0
//
// Where the ranks of a group announce how many rows their messages have (announcement.h): host
// memory that the GPUs of all ranks write to, and that the movers of all ranks read.
#ifndef SMFREE_CSRC_CUDA_MEMORY_ANNOUNCEMENTS_H_
#define SMFREE_CSRC_CUDA_MEMORY_ANNOUNCEMENTS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "csrc/core/status.h"

namespace smfree::cuda {

class Announcements {
 public:
  // Zeros. With a name, the ranks are in several processes of one host, and each of them maps the
  // same memory under that name until one calls Unname.
  static StatusOr<Announcements> Map(size_t bytes, const std::string& name);
  Announcements() = default;
  Announcements(Announcements&& other) noexcept { *this = std::move(other); }
  Announcements& operator=(Announcements&& other) noexcept;
  ~Announcements() { Unmap(); }

  // Nobody else maps it any more; what is mapped stays.
  void Unname();

  uint64_t* on_host() const { return on_host_; }
  uint64_t* on_device() const { return on_device_; }
  size_t bytes() const { return bytes_; }

 private:
  void Unmap();

  uint64_t* on_host_ = nullptr;
  uint64_t* on_device_ = nullptr;  // the same memory, as kernels reach it
  size_t bytes_ = 0;
  std::string name_;  // of a file in /dev/shm; "" if there is none, or none any more
  bool is_file_ = false;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_ANNOUNCEMENTS_H_
