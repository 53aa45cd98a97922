// SPDX-License-Identifier: Apache-2.0
//
// How messages are waited for and verified on the device (S7, S8), and where their rows lie then.
#ifndef SMFREE_CSRC_CUDA_KERNELS_ARRIVALS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_ARRIVALS_CUH_

#include <cstdint>

#include "csrc/core/patience.h"
#include "csrc/cuda/kernels/messages.cuh"
#include "csrc/protocol/announcement.h"

namespace smfree::cuda {

// Which member of the leg has not announced operation `m.number`; -1 if all have.
__device__ inline int32_t NotAnnounced(const Messages& m) {
  const GroupConstants& g = m.g;
  const AnnouncementTable table = g.layout.Announcements(m.leg);
  for (int32_t member = 0; m.op.in_areas && member < g.nodes.Members(m.leg); ++member) {
    const Announcement announcement{load_acquire_system(
        g.announced + table.At(m.set.index, m.number, m.Peer(member), 0))};
    if (!announcement.IsOf(m.number)) return member;
  }
  return -1;
}

// Where the rows of a message that is received lie, and its slots.
struct Incoming {
  const char* rows;
  const float* slots;
  int32_t first_row;  // rows of the messages before it
};

__device__ inline Incoming IncomingFrom(const Messages& m, int32_t source, int32_t rows,
                                        int32_t first_row) {
  const char* const payload = m.PayloadFrom(source);
  const MessageLayout layout = m.LayoutFrom(source, rows);
  return {payload + layout.rows_offset,
          reinterpret_cast<const float*>(payload + layout.slots_offset), first_row};
}

// The chunks that a block has seen arrive, in shared memory: one warp at a time looks at the signal
// for all of them. Thousands of warps that do would keep the mover's store from it.
struct Arrivals {
  int32_t chunks[kMaxRanks];
  uint32_t looking[kMaxRanks];
  // Whether this block asks all the time if other ranks have failed. The word is in host memory,
  // and many that read there slow the copy engine down: one thread of one block, for each message,
  // does. All others ask rarely (kTurnsOfTheOthers), in case that block waits for nothing.
  bool asks;

  // By all threads of a block, which meet afterwards.
  __device__ void Clear(bool asks_others = blockIdx.x == 0) {
    asks = asks_others;
    for (int32_t region = threadIdx.x; region < kMaxRanks; region += blockDim.x) {
      chunks[region] = 0;
      looking[region] = 0;
    }
  }
};

constexpr int32_t kTurnsOfTheOthers = 4096;  // some ten milliseconds
// So often a block looks again at once. Where a kernel stores the rows, they come in microseconds,
// and no copy is slowed down.
constexpr int32_t kQuickTurns = 4, kQuickTurnsOfPush = 64;

// S7: until `wanted` chunks (kAllChunks: all) of a message are here. False if the rank has failed,
// as after the deadline.
__device__ inline bool WaitForChunks(const Messages& m, int32_t region, int32_t wanted,
                                     Arrivals& arrivals) {
  if (m.IsOwn(region)) return true;
  const GroupConstants& g = m.g;
  const SetPointers& set = m.set;
  const OperationParams& op = m.op;
  volatile int32_t& here = arrivals.chunks[region];
  const char* const word = g.memory + g.layout.SignalOffset(m.leg, set.index, m.number, region);
  int64_t begin = 0;
  for (int32_t turn = 0; here < wanted; ++turn) {
    const bool looks = atomicExch(&arrivals.looking[region], 1u) == 0;
    if (looks) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      const int32_t chunks = ChunksArrived(seen, m.number);
      __threadfence_block();  // what the signal vouches for, before `here`
      if (chunks > here) here = chunks;
      atomicExch(&arrivals.looking[region], 0u);
      if (chunks >= wanted) break;
    }
    if (begin == 0) begin = NowNs();
    __nanosleep(turn < (op.push ? kQuickTurnsOfPush : kQuickTurns) ? 100 : 2000);
    if (turn % 16 != 15) continue;
    if (Faulted(g)) return false;
    const bool asks = looks && (arrivals.asks || turn % kTurnsOfTheOthers == kTurnsOfTheOthers - 1);
    if (asks && OthersFailed(g, op, m.number)) return false;
    const bool for_relay = m.leg != g.nodes.FirstLeg(op.operation);
    if (NowNs() - begin > PatienceNs(g.timeout_ns, for_relay)) {
      // No row moves before all have announced: whoever has not is the one that is waited for.
      const int32_t silent = NotAnnounced(m);
      const int32_t of_first = region - region % g.nodes.Members(m.leg);
      const int32_t late = silent < 0 || m.IsOwn(silent) ? region : of_first + silent;
      const char* const its_word =
          g.memory + g.layout.SignalOffset(m.leg, set.index, m.number, late);
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(its_word));
      Report(g, op, FaultKind::kDeadline, m.number, {m.Peer(late), -1, m.number, NumberOf(seen)});
      return false;
    }
  }
  __threadfence_block();  // `here`, before what it vouches for
  if (begin != 0 && blockIdx.x == 0) {
    atomicMax(&set.scratch->last_arrival_ns, static_cast<unsigned long long>(NowNs()));
  }
  return true;
}

// S8, of a message whose first chunk is here. `rows` is what the handle says, or -1 for any number.
__device__ inline bool Verify(const Messages& m, int32_t region, int32_t rows,
                              const RegionHeader& header) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  const int32_t peer = m.Peer(region);
  const bool same = header.number == m.number && header.call_site == op.call_site &&
                    header.operation == op.operation && header.lane == op.lane &&
                    header.derivation == op.derivation && header.source == peer &&
                    header.tokens == op.tokens && header.stride == op.stride &&
                    header.experts == op.experts && header.slots == op.slots &&
                    header.rows >= 0 && header.rows <= header.sent && header.sent <= op.tokens &&
                    header.chunks == op.chunks && (rows < 0 || header.rows == rows);
  if (!same) {
    Report(g, op, FaultKind::kScheduleMismatch, m.number,
           {peer, -1, rows < 0 ? op.tokens : rows, rows < 0 ? header.tokens : header.rows, header});
  }
  return same;
}

// The header of a message whose first chunk is here.
__device__ inline RegionHeader HeaderOf(const Messages& m, int32_t region) {
  const auto* const words = reinterpret_cast<const uint64_t*>(m.HeaderFrom(region));
  union {
    RegionHeader header;
    uint64_t copy[sizeof(RegionHeader) / sizeof(uint64_t)];
  };
  for (size_t i = 0; i < sizeof(copy) / sizeof(copy[0]); ++i) copy[i] = __ldcg(words + i);
  return header;
}

// S7 and S8 for the first chunk of a message: fills in `rows`. `expected_rows` may be -1.
__device__ inline bool OpenMessage(const Messages& m, int32_t region, int32_t expected_rows,
                                   int32_t& rows, Arrivals& arrivals) {
  if (!WaitForChunks(m, region, 1, arrivals)) return false;
  const RegionHeader header = HeaderOf(m, region);
  rows = header.rows;
  return Verify(m, region, expected_rows, header);
}

// The same for all messages, by all threads of a block, with the same result in all of them.
// `expected_rows` may be null.
__device__ inline bool OpenMessages(const Messages& m, const int32_t* expected_rows, int32_t* rows,
                                    Arrivals& arrivals) {
  arrivals.Clear();
  __syncthreads();
  bool ok = true;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    const int32_t expected = expected_rows ? expected_rows[region] : -1;
    ok = OpenMessage(m, region, expected, rows[region], arrivals) && ok;
  }
  return __syncthreads_and(ok);
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_ARRIVALS_CUH_
