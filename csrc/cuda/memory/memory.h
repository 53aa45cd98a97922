// SPDX-License-Identifier: Apache-2.0
//
// The symmetric memory of a rank: its signals and regions, which its peers write.
#ifndef SMFREE_CSRC_CUDA_MEMORY_MEMORY_H_
#define SMFREE_CSRC_CUDA_MEMORY_MEMORY_H_

#include <cstddef>

#include "csrc/core/status.h"

namespace smfree::cuda {

class SymmetricMemory {
 public:
  virtual ~SymmetricMemory() = default;
  SymmetricMemory(const SymmetricMemory&) = delete;
  SymmetricMemory& operator=(const SymmetricMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // From now on there are at least `bytes`; what is added is zero. What fails changes nothing. Does
  // nothing where all memory is there from the beginning.
  virtual Status Grow(size_t /*bytes*/) { return {}; }

 protected:
  SymmetricMemory() = default;

  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MEMORY_MEMORY_H_
