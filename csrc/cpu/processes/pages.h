// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_CSRC_CPU_PROCESSES_PAGES_H_
#define SMFREE_CSRC_CPU_PROCESSES_PAGES_H_

#include <sys/mman.h>

#include <cstdint>

namespace smfree::cpu {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kHugePageBytes = 2 << 20;

// Asks for huge pages where memory is about to be written for the first time. Large results of a
// program are often fresh memory in every run: the faults of small pages then cost several times
// what writing the rows costs. Advice only, and nothing for small arrays.
inline void AdviseHugePages(void* data, int64_t bytes) {
  if (bytes < 2 * kHugePageBytes) return;
  const uintptr_t page = kPageBytes;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + page - 1) / page * page;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_PAGES_H_
