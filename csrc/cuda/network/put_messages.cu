// SPDX-License-Identifier: Apache-2.0
//
// S5 and S6 for peers in other nodes, where the GPU itself starts the puts: behind the kernel that
// has packed the messages, on its stream. The only code with NVSHMEM's device library: it is a
// module of its own, which put_kernel.cc loads.
//
// A block per message puts all of it at once: it is packed, and chunks would need fences between
// them, which IBGDA makes of waiting for the network. The call returns when the put is posted, so
// that no SM waits; the message stays as it is until its receiver has read it (PROTOCOL.md, rule 3).
//
// For a large operation this block waits for the announcements, in place of the mover, and so does
// whatever stands behind it on the stream. A kernel before it tells the far peers what this rank
// announces: all of its blocks end, even where those that wait take the whole device.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "csrc/core/patience.h"
#include "csrc/cuda/kernels/messages.cuh"
#include "csrc/cuda/network/put_kernel.h"
#include "csrc/protocol/announcement.h"

namespace smfree::cuda {
namespace {

// The operation that the kernel before has packed.
struct Packed {
  const GroupConstants& g;
  const OperationParams& op;
  SetPointers set;
  int64_t number;

  __device__ Packed(const KernelParams& params)
      : g(params.g),
        op(params.op),
        set(params.sets.At(Token::Read(op.token_out).set())),
        number(Token::Read(op.token_out).number) {}
};

// The word of a member of the wire, where it is: that of a far one has been put here.
__device__ const uint64_t* WordOf(const Packed& p, int32_t rank, int32_t word) {
  const GroupConstants& g = p.g;
  const uint64_t* const words =
      rank != g.rank && g.memories[rank] == nullptr
          ? reinterpret_cast<const uint64_t*>(g.memory + g.layout.AnnouncedOffset())
          : g.announced;
  return words + g.layout.Announcements(kWire).At(p.set.index, p.number, rank, word);
}

// Waits for a word of this operation; one of another operation if the rank has failed.
__device__ Announcement AwaitWord(const Packed& p, int32_t rank, int32_t word) {
  const GroupConstants& g = p.g;
  const uint64_t* const from = WordOf(p, rank, word);
  const bool by_relay = g.nodes.FirstLeg(p.op.operation) != kWire;
  const int64_t begin = NowNs();
  for (int32_t turn = 1;; ++turn) {
    const Announcement seen{load_acquire_system(from)};
    if (seen.IsOf(p.number)) return seen;
    __nanosleep(2000);
    if (turn % 16 != 0) continue;
    if (Faulted(g)) return {};
    if (turn % 4096 == 0 && OthersFailed(g, p.op, p.number)) return {};
    if (NowNs() - begin <= PatienceNs(g.timeout_ns, by_relay)) continue;
    Report(g, p.op, FaultKind::kDeadline, p.number, {rank, -1, p.number, 0});
    return {};
  }
}

// What the block of a message knows, in shared memory: the words that its place at the peer follows
// from, by member of the wire.
struct Planned {
  int32_t rows[kMaxRanks], rows_in_node[kMaxRanks];
  bool agreed;     // all members run the same operation, and it fits
  int64_t at;      // in the area there
  int32_t taken;   // rows of the message

  // As Release does for the mover. By all threads of a block; false if the rank has failed.
  __device__ bool Plan(const Packed& p, const Messages& wire, int32_t region) {
    const GroupConstants& g = p.g;
    const int32_t members = g.nodes.Members(kWire);
    const bool to_relay = g.nodes.hierarchical;
    const uint32_t mark = AwaitWord(p, g.rank, region).operation();
    bool ok = true, same = true;
    for (int32_t i = threadIdx.x; i < members; i += blockDim.x) {
      const Announcement message = AwaitWord(p, wire.Peer(i), region);
      const Announcement in_node =
          to_relay ? AwaitWord(p, wire.Peer(i), wire.count() + region) : message;
      ok = ok && message.IsOf(p.number) && in_node.IsOf(p.number);
      same = same && message.operation() == mark;
      rows[i] = message.rows();
      rows_in_node[i] = in_node.rows();
    }
    if (!__syncthreads_and(ok)) return false;
    same = __syncthreads_and(same);
    if (threadIdx.x == 0) {
      const int32_t peer = wire.Peer(region);
      Taking taking(g.nodes, kWire, p.op.operation, p.op.wire_rows);
      int64_t bytes = 0;
      for (int32_t i = 0; i < members; ++i) {
        const int64_t of_member = taking.Next(rows[i], rows_in_node[i]);
        if (wire.Peer(i) == g.rank) {
          at = bytes;
          taken = static_cast<int32_t>(of_member);
        }
        if (wire.Peer(i) != peer) bytes += LayoutOf(p.op, of_member).bytes;
      }
      agreed = same && bytes <= g.layout.area_bytes[kWire];
    }
    __syncthreads();
    return true;
  }
};

// A put of one block, at the same offset as here or at another one.
struct Put {
  const GroupConstants& g;
  int32_t process;

  __device__ void Bytes(int64_t from, int64_t to, int64_t bytes) const {
    if (bytes == 0) return;
    nvshmemx_putmem_nbi_block(g.memory + to, g.memory + from, static_cast<size_t>(bytes), process);
  }
  // The last one of several, behind which the word at `word` is set: it says that all are there.
  __device__ void Last(int64_t from, int64_t to, int64_t bytes, int64_t word,
                       uint64_t value) const {
    nvshmemx_putmem_signal_nbi_block(g.memory + to, g.memory + from, static_cast<size_t>(bytes),
                                     reinterpret_cast<uint64_t*>(g.memory + word), value,
                                     NVSHMEM_SIGNAL_SET, process);
  }
  // What comes after it is there after what came before.
  __device__ void Fence() const {
    __syncthreads();
    if (threadIdx.x == 0) nvshmem_fence();
    __syncthreads();
  }
};

// The payload of a message whose header is in its region; `taken` rows of it move. The fence waits
// for what is small: the header and, where not all rows are taken, what stands before them.
__device__ void PutLarge(const Packed& p, const Put& put, int32_t region, int32_t there,
                         const Planned& planned) {
  const GroupConstants& g = p.g;
  const Layout& layout = g.layout;
  const int64_t header = layout.SendRegionOffset(kWire, p.set.index, p.number, region);
  const int64_t header_there = layout.RecvRegionOffset(kWire, p.set.index, p.number, there);
  const int64_t word = layout.SignalOffset(kWire, p.set.index, p.number, there);
  const uint64_t arrived = SignalValue(p.number, kAllChunks);
  const int32_t taken = planned.agreed ? planned.taken : 0;
  if (taken == 0) return put.Last(header, header_there, layout.header_bytes, word, arrived);

  put.Bytes(header, header_there, layout.header_bytes);
  const int32_t rows = reinterpret_cast<const RegionHeader*>(g.memory + header)->rows;
  const MessageLayout packed = LayoutOf(p.op, rows), lies = LayoutOf(p.op, taken);
  const int64_t from = layout.SendAreaOffset(kWire, p.set.index, p.number) +
                       p.set.scratch->packed_at[kWire][region];
  const int64_t to = layout.RecvAreaOffset(kWire, p.set.index, p.number) + planned.at;
  const bool whole = taken == rows;
  if (!whole) {
    put.Bytes(from + packed.experts_offset, to + lies.experts_offset,
              int64_t{taken} * p.op.experts * kExpertIdBytes);
    put.Bytes(from + packed.slots_offset, to + lies.slots_offset,
              int64_t{taken} * p.op.slots * kSlotBytes);
  }
  put.Fence();
  const int64_t first = whole ? 0 : packed.rows_offset, first_there = whole ? 0 : lies.rows_offset;
  put.Last(from + first, to + first_there, lies.rows_offset + taken * p.op.stride - first_there,
           word, arrived);
}

}  // namespace

// Tells a far peer what this rank has announced.
extern "C" __global__ void __launch_bounds__(kPutThreads)
    smfree_put_announcements(const __grid_constant__ KernelParams params,
                             const ProcessOfRank process) {
  const GroupConstants& g = params.g;
  if (Faulted(g)) return;
  const Packed p(params);
  const int32_t peer = g.nodes.Peer(kWire, g.rank, static_cast<int32_t>(blockIdx.x));
  if (g.memories[peer] != nullptr) return;
  const AnnouncementTable table = g.layout.Announcements(kWire);
  const int64_t first = g.layout.AnnouncedOffset() +
                        table.At(p.set.index, p.number, g.rank, 0) * kSignalBytes;
  const int64_t last = first + (table.words - 1) * kSignalBytes;
  const uint64_t word = *reinterpret_cast<const uint64_t*>(g.memory + last);
  // The last word is put twice, because a put ends with one.
  Put{g, process.of_rank[peer]}.Last(first, first, table.words * kSignalBytes, last, word);
}

extern "C" __global__ void __launch_bounds__(kPutThreads)
    smfree_put_messages(const __grid_constant__ KernelParams params, const ProcessOfRank process) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Planned planned;
  if (Faulted(g)) return;  // then not all is packed
  const Packed p(params);
  const Messages wire{g, p.set, op, kWire, p.number};
  const auto region = static_cast<int32_t>(blockIdx.x);
  const int32_t peer = wire.Peer(region);
  if (g.memories[peer] != nullptr) return;
  const int32_t there = g.nodes.RegionAtPeer(kWire, g.rank, region);
  const Put put{g, process.of_rank[peer]};
  if (op.in_areas) {
    if (planned.Plan(p, wire, region)) PutLarge(p, put, region, there, planned);
    return;
  }
  const int64_t from = g.layout.SendRegionOffset(kWire, p.set.index, p.number, region);
  const int64_t to = g.layout.RecvRegionOffset(kWire, p.set.index, p.number, there);
  const int32_t rows = reinterpret_cast<const RegionHeader*>(g.memory + from)->rows;
  put.Last(from, to, g.layout.header_bytes + LayoutOf(op, rows).bytes,
           g.layout.SignalOffset(kWire, p.set.index, p.number, there),
           SignalValue(p.number, kAllChunks));
}

}  // namespace smfree::cuda
