// SPDX-License-Identifier: Apache-2.0
//
// The state of a group on the host: its ranks, their memory and movers, and its faults.
#ifndef SMFREE_CSRC_CUDA_HOST_GROUP_H_
#define SMFREE_CSRC_CUDA_HOST_GROUP_H_

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "csrc/core/patience.h"
#include "csrc/cuda/backend.h"
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/host/launch_order.h"
#include "csrc/cuda/host/runs.h"
#include "csrc/cuda/host/mover.h"
#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/memory/announcements.h"
#include "csrc/cuda/memory/memory.h"
#include "csrc/cuda/memory/memory_nvshmem.h"
#include "csrc/cuda/network/put_kernel.h"

namespace smfree::cuda {

class Rank {
 public:
  int32_t rank = 0;
  int32_t index = 0;  // among those of this process
  int32_t device = 0;
  int32_t num_sms = 0;  // that its kernels fill: all, but one where puts need room (far_peers.h)
  GroupState* group = nullptr;

  std::shared_ptr<SymmetricMemory> memory;
  Allocation state;         // RankState
  Allocation scratch;       // [set], also of those to come, see SetScratchLayout
  Allocation peer_table;    // [R] pointers to the memories
  Allocation queue;         // pinned
  Allocation host;          // pinned HostPage
  std::unique_ptr<Mover> mover;

  GroupConstants Constants() const;
  SetsOfRank Sets() const;
};

struct GroupState {
  GroupState(int64_t id, int32_t replica_of_mesh, const GroupConfig& group_config)
      : group_id(id), replica(replica_of_mesh), config(group_config) {}

  const int64_t group_id;
  const int32_t replica;
  const GroupConfig config;
  Layout layout{};
  uint64_t queue_mask = 0;

  // What the movers' threads call, and so stands before the ranks that own them: it is there until
  // they have ended.
  Allocation failed;  // pinned uint32: some rank has reported a fault; the host asks Failed()
  Announcements announcements;
  std::unique_ptr<LaunchOrder> launch_order;
  mutable std::mutex fault_mutex;
  Status host_fault;  // of a mover, or kClosed; when all is released, the group's fault

  std::vector<std::unique_ptr<Rank>> ranks;  // of this process
  std::vector<char*> memories;               // of all ranks; nullptr for far ones
  std::vector<int32_t> far_processes;        // of far ranks; FarPeers::kNear for near ones
  std::shared_ptr<NvshmemMemory> nvshmem_memory;  // of NVSHMEM's heap; null if all ranks are here
  std::unique_ptr<PutKernel> put_kernel;     // null: the mover puts, or there are no far peers
  Runs runs;

  std::mutex sets_mutex;               // of whoever makes sets, which may take long
  std::atomic<int32_t> num_sets{0};    // that all ranks of this process have; only ever more
  int32_t first_sets = 0;              // when the group was made
  mutable std::mutex sizes_mutex;
  Memory sizes;  // of all this

  // Held shared while a phase is launched or device memory is read, exclusively while all is
  // released. Nobody waits for it but Release: who does not get it finds the group closed.
  std::shared_mutex open_mutex;
  std::atomic<bool> closed{false};
  std::atomic<bool> idle{false};      // closed, and the devices have ended what was launched
  std::atomic<bool> released{false};  // nothing of all this is there any more
  StatusOr<GroupStats> last_stats{Status(FaultKind::kClosed,
                                    "the group is closed, and a GPU does not end what it runs, so "
                                    "that its counters cannot be read")};

  bool Failed() const;
  void Fail(Status fault);
  // The first fault, of a device or of the host.
  Status FirstFault() const;
  Status TakeOverflow();
  std::chrono::nanoseconds Timeout() const {
    return std::chrono::nanoseconds(Nanoseconds(config.timeout_s));
  }

  // What is told when the group is closed.
  void KeepFault();
  // These wait for the devices.
  StatusOr<GroupStats> Count() const;
  void KeepStats();
  StatusOr<std::vector<PhaseRecord>> ReadTrace() const;
  // Ends the movers and gives all memory back, when nothing uses it any more. The group is closed.
  void Release();

  // From now on there are at least `count` sets, for which there is room. Waits for the devices to
  // set them to zero.
  Status MakeSets(int32_t count);

  // All ranks, on devices of this process.
  Status AllocateHere(const std::vector<int32_t>& devices);
  // The rank of this process; that of rank r is in process `process_of_rank[r]`.
  Status AllocateAmongProcesses(int32_t rank, int32_t device,
                                std::shared_ptr<NvshmemMemory> memory,
                                const std::vector<int32_t>& process_of_rank,
                                const std::string& name);
  // Room for so many sets. `name`: see Announcements.
  Status Prepare(const std::string& name, int32_t most_sets);
  Status FindPeers(int32_t rank, int32_t device, const NvshmemMemory& memory,
                   const std::vector<int32_t>& process_of_rank);
  bool HasFarPeers() const;
  // Messages that the mover of a rank puts to other nodes in each operation.
  int32_t FarMessages() const;
  Status AllocateRank(int32_t rank, int32_t device, std::shared_ptr<SymmetricMemory> memory);
  Status Connect();
};

// Where a SetScratch has its counts, flags, tags and places, each aligned to kAlignment.
struct SetScratchLayout {
  int64_t counts_offset, flags_offset, tags_offset, wire_places_offset, bytes;
  explicit SetScratchLayout(const GroupConfig& config);
};

// Words for what a device has recorded.
Status DescribeFault(const FaultRecord& fault, int32_t rank, double timeout_s);
Status DescribeOverflow(const OverflowRecord& overflow, int32_t rank, const GroupConfig& config);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_GROUP_H_
