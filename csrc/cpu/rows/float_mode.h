// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_CSRC_CPU_ROWS_FLOAT_MODE_H_
#define SMFREE_CSRC_CPU_ROWS_FLOAT_MODE_H_

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace smfree::cpu {

// Round to nearest, no flushing of denormals, for the lifetime of the object.
class ScopedIeeeMode {
 public:
#if defined(__SSE2__)
  ScopedIeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultMxcsr); }
  ~ScopedIeeeMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefaultMxcsr = 0x1f80;  // all exceptions masked, no FTZ, no DAZ
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedIeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~ScopedIeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
#error "Tell ScopedIeeeMode how this processor sets its floating-point mode"
#endif

 public:
  ScopedIeeeMode(const ScopedIeeeMode&) = delete;
  ScopedIeeeMode& operator=(const ScopedIeeeMode&) = delete;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_FLOAT_MODE_H_
