// SPDX-License-Identifier: Apache-2.0
//
// The `arrived` signal: one 64-bit word per set, parity and source in the receiver's symmetric
// memory. The mover raises it after each chunk it has copied; the receiver polls it. It only ever
// grows, so nothing is reset between operations.
//
//   bit   63 … 8                    7 … 0
//         number of the operation   chunks of its message that have arrived, kAllChunks = all
//
// Into how many chunks a message is cut is the sender's choice (< kAllChunks): the last one raises
// kAllChunks, so "everything is here" is one compare that does not depend on that choice.
#ifndef SMFREE_CSRC_PROTOCOL_SIGNALS_H_
#define SMFREE_CSRC_PROTOCOL_SIGNALS_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/lanes.h"

namespace smfree {

constexpr int32_t kChunkBits = 8;
constexpr int32_t kAllChunks = (1 << kChunkBits) - 1;
constexpr int64_t kMaxNumber = (int64_t{1} << (63 - kChunkBits)) - 1;

// What the mover stores after `chunks` chunks of operation `number`.
SMFREE_HD constexpr uint64_t SignalValue(int64_t number, int32_t chunks) {
  return (static_cast<uint64_t>(number) << kChunkBits) | static_cast<uint64_t>(chunks);
}

// How many chunks a signal vouches for once chunk `chunk` (0 ≤ chunk < num_chunks) has arrived.
SMFREE_HD constexpr int32_t ChunksThrough(int32_t chunk, int32_t num_chunks) {
  return chunk + 1 == num_chunks ? kAllChunks : chunk + 1;
}

// What the mover stores after chunk `chunk` of a message in `num_chunks`.
SMFREE_HD constexpr uint64_t SignalAfterChunk(int64_t number, int32_t chunk, int32_t num_chunks) {
  return SignalValue(number, ChunksThrough(chunk, num_chunks));
}

// How many chunks of operation `number` a signal vouches for. A signal of a later operation vouches
// for all, one of an earlier operation for none.
SMFREE_HD constexpr int32_t ChunksArrived(uint64_t signal, int64_t number) {
  const uint64_t none = SignalValue(number, 0);
  if (signal <= none) return 0;
  const uint64_t chunks = signal - none;
  return chunks < kAllChunks ? static_cast<int32_t>(chunks) : kAllChunks;
}

SMFREE_HD constexpr bool AllArrived(uint64_t signal, int64_t number) {
  return ChunksArrived(signal, number) == kAllChunks;
}

// What a fault report says it saw.
SMFREE_HD constexpr int64_t NumberOf(uint64_t signal) {
  return static_cast<int64_t>(signal >> kChunkBits);
}

// The first value of an operation lies above every value of the one before it.
static_assert(SignalValue(2, 0) > SignalValue(1, kAllChunks));
static_assert(SignalAfterChunk(7, 1, 3) < SignalAfterChunk(7, 2, 3));

// Memory order. Scope "system": between threads, processes of one host, devices, and host and
// device. The words are plain uint64_t because they lie in memory that others map; both sides must
// go through these two functions.

// Everything this thread has written, and everything it has observed through load_acquire_system,
// is visible to whoever reads `value` (or a later one) with load_acquire_system. Pairs with:
//   load_acquire_system in the wait loop of the recv phase (the mover's or a kernel's store of
//   `arrived`), and in the mover's loop (a send phase's store of a chunk handed over).
SMFREE_HD inline void store_release_system(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

// Pairs with store_release_system, and with the mover's other ways to raise a signal after its copy
// (a stream memory write behind the copy on one stream, an NVSHMEM put with signal).
SMFREE_HD inline uint64_t load_acquire_system(const uint64_t* word) {
#if defined(__CUDA_ARCH__)
  uint64_t value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_SIGNALS_H_
