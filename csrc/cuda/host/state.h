// SPDX-License-Identifier: Apache-2.0
//
// What lies in memory between the kernels, the mover and the host, and what every kernel is told.
#ifndef SMFREE_CSRC_CUDA_HOST_STATE_H_
#define SMFREE_CSRC_CUDA_HOST_STATE_H_

#include <cstdint>

#include "csrc/cuda/backend.h"
#include "csrc/cuda/host/descriptor.h"
#include "csrc/protocol/announcement.h"
#include "csrc/protocol/faults.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/layout.h"
#include "csrc/protocol/message.h"
#include "csrc/protocol/sets.h"

namespace smfree::cuda {

constexpr int32_t kMaxRanks = 512;  // each has a place in the kernels' shared memory
constexpr int32_t kMaxLists = 64;   // nodes, and ranks of a node: those of a row are bits of a word
constexpr int32_t kMaxTopK = 32;    // a thread of a warp per slot
constexpr int32_t kMaxChunks = 16;  // of one message
constexpr int32_t kMaxChunksOfLeg = 1024;  // of all messages
static_assert(kMaxChunksOfLeg >= 2 * kMaxRanks);
constexpr int32_t kTracedOperations = 64;  // of each rank, the most recent ones at least

// The first fault of a rank. Pinned host memory; `ready` is written last.
struct FaultRecord {
  uint32_t ready;
  FaultKind kind;
  Phase phase;
  int32_t lane;
  int32_t derivation;
  uint32_t call_site;
  int32_t peer;  // -1: none
  int32_t row;   // kInvalidRouting
  int64_t number;
  int64_t expected;
  int64_t seen;
  uint32_t seen_call_site;  // kScheduleMismatch: of what the peer sent
  Operation seen_operation;
  int32_t seen_derivation;
  int64_t seen_number;
  int64_t stride, seen_stride;  // of rows, and of the peer's
  int64_t time_ns;
};

// Rows that exceeded a capacity, the last time it happened. Pinned host memory.
struct OverflowRecord {
  uint32_t ready;
  bool on_wire;   // wire_capacity; else recv_capacity
  bool at_relay;  // wire_capacity there
  int32_t lane;
  int32_t derivation;
  uint32_t call_site;
  int64_t number;
  int64_t dropped;   // copies
  int64_t received;  // on_wire: rows that were sent here
  int64_t capacity;
  int32_t busiest_expert;  // the one that got the most copies
  int64_t its_copies;
};

struct HostPage {  // pinned, one per rank
  FaultRecord fault;
  OverflowRecord overflow;
};

struct TraceEntry {
  int32_t lane, derivation;
  int64_t number, begin_ns, end_ns, bytes_read, bytes_written;
};

// Device memory, one per rank, zero at the start. A rank's kernels follow one another on a stream.
struct RankState {
  uint32_t in_flight;  // sets that are taken, as bits
  int32_t num_sets;    // that there are now; written by the host
  int64_t sends;       // operations ever sent
  LaneState sets[kMaxSets];
  uint32_t faulted;  // this rank takes no further part: outputs are NaN, nothing is sent
  unsigned long long queue_tail;  // descriptors ever written
  unsigned long long calls[kPhases], rows[kPhases], bytes[kPhases], wait_ns[kPhases];
  unsigned long long rows_dropped;
  unsigned long long rows_relayed, bytes_relayed;
  unsigned long long internode_bytes[2];  // by Operation
};

// Device memory, one per rank and set, zero at the start.
struct SetScratch {
  unsigned long long epoch;  // send phases ever run, for the barrier inside Route
  int64_t begin_ns;
  uint32_t phases_begun, phases_ended;  // one at a time, or two sends are
  unsigned long long last_arrival_ns;  // of the chunk waited for last, 0 if none was
  unsigned long long copies;           // rows of the expert-grouped array that were read or written
  uint32_t blocks_done;
  uint32_t overflowed;               // this dispatch_recv's outputs are NaN
  // Rows of messages, by region: of the operation that is being received; of hierarchical mode, on
  // the wire from this rank, through this relay on the wire, and through it inside the node.
  int32_t source_rows[kMaxRanks], wire_rows[kMaxRanks];
  int32_t relay_wire_rows[kMaxRanks], relay_node_rows[kMaxRanks];
  // For the operation that is being received: the rows that each source has sent, of which not all
  // may be kept, and the rows of the sources before it. Then, by leg and region, where payloads
  // stand in the area that was packed last and in the one received in.
  int32_t source_sent[kMaxRanks], source_first[kMaxRanks];
  int64_t packed_at[kLegs][kMaxRanks], received_at[kLegs][kMaxRanks];
  uint32_t packed[kMaxRanks][kMaxChunks];  // by region: rows that are complete
  uint32_t posted[kMaxRanks];              // chunks handed over
  TraceEntry trace[kTracedOperations][kPhases];  // at OperationOfNumber % kTracedOperations
};

// What kernels are told, in three parts. A kernel takes all of it by value (KernelParams), a
// function on the device those parts that it depends on.

// The same in every kernel of a rank.
struct GroupConstants {
  Layout layout;
  CopyCode code{1};
  Nodes nodes;
  int32_t rank, num_ranks, num_experts, top_k;
  int32_t places_per_row, wire_width, relay_width;  // of a row: most ranks, messages on the wire,
                                                    // and from a relay inside its node
  int32_t expert_alignment;
  bool padded_groups;
  bool drop_overflow;
  bool among_processes;  // peers tell of a fault through the fault words
  bool puts_on_device;   // to far peers: by a kernel, not by the mover
  int64_t timeout_ns;

  char* memory;           // this rank's symmetric memory
  char* const* memories;  // [R], that of every rank (device array); nullptr for far ones
  RankState* state;
  Descriptor* queue;
  uint64_t queue_mask;
  HostPage* host;
  uint32_t* group_failed;  // pinned, one per group
  uint64_t* announced;     // pinned, one per group: words as AnnouncementTable says

  SMFREE_HD int32_t local_experts() const { return num_experts / num_ranks; }
};

// The memory of one set, as a kernel uses it.
struct SetPointers {
  int32_t index;
  SetScratch* scratch;
  int32_t* wire_places;   // [T, wire_width]: in hierarchical mode, see places.cuh
  int32_t* route_counts;  // [route blocks, bins]
  uint64_t* route_flags;  // [route blocks]
  uint32_t* row_tags;     // [N]: the number of the operation that writes the row
};

// Where that memory is: which set an operation has is known on the device.
struct SetsOfRank {
  int32_t count;  // that there is room for
  char* scratch;
  int64_t scratch_bytes;  // of one set
  int64_t counts_offset, flags_offset, tags_offset, wire_places_offset;

  SMFREE_HD SetPointers At(int32_t set) const {
    char* const at = scratch + set * scratch_bytes;
    return {set,
            reinterpret_cast<SetScratch*>(at),
            reinterpret_cast<int32_t*>(at + wire_places_offset),
            reinterpret_cast<int32_t*>(at + counts_offset),
            reinterpret_cast<uint64_t*>(at + flags_offset),
            reinterpret_cast<uint32_t*>(at + tags_offset)};
  }
};

// What one phase of an operation is called with.
struct OperationParams {
  Phase phase;
  Operation operation;
  int32_t lane, derivation;
  uint32_t call_site;
  int32_t tokens;
  int64_t row_bytes;       // of a row in the arrays of the program, all leaves
  int64_t stride;          // of rows in messages
  int32_t experts, slots;  // per row of the message: top_k or 0
  int32_t chunks;          // into how many a message is cut
  int32_t pieces;          // into how many a row is cut, each for one warp; divides kWarps
  bool push;               // store to the near peers, no mover
  bool in_areas;           // payloads stand in areas, and counts are announced
  int32_t wire_rows;       // the most that this rank receives
  const int32_t* position;
  const float* token;
  float* token_out;
};

struct KernelParams {
  GroupConstants g;
  SetsOfRank sets;
  OperationParams op;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_STATE_H_
