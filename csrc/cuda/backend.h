// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend: an expert-parallel group whose ranks are GPUs, of one process or one in each of
// several processes, and the phases that exchange rows between them. No XLA, no Python.
//
// Every phase only launches kernels on the given stream: no allocation, no waiting for the device,
// no counter on the host, so that it can be captured into a CUDA graph and replayed. (Outside of
// graphs a recv waits on the host for the launches of its peers' sends, see launch_order.h.)
// Results are those of the CPU backend, bit for bit (but for the inner products of rows in
// dispatch_recv_weighted).
//
// Faults of a phase that runs on the device end in NaN outputs and in Group::Check. The phases of
// later runs of programs return the fault (runs.h).
#ifndef SMFREE_CSRC_CUDA_BACKEND_H_
#define SMFREE_CSRC_CUDA_BACKEND_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/core/stats.h"
#include "csrc/core/status.h"
#include "csrc/cuda/host/in_flight.h"
#include "csrc/protocol/arrays.h"
#include "csrc/protocol/group_config.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/phase.h"

namespace smfree::cuda {

struct GroupStats : Stats {
  int64_t sets_added = 0;         // since the group was made, for programs that need them
  int64_t sends_without_set = 0;  // that found none free, which is a fault
  bool faulted = false;  // a rank of this process takes no further part
};

struct Memory {
  int64_t device_bytes = 0;  // symmetric regions and signals
  int64_t scratch_bytes = 0;
  int64_t pinned_bytes = 0;  // host: descriptors and fault records
};

// The replica is the group's own number among those of its mesh.
//
// One phase of one rank as it ran: device time in ns (%globaltimer), from the start of its first
// block to the end of its last one, and the bytes it has to move at least. `number` counts the
// rank's operations from 0, as errors do.
struct PhaseRecord {
  int32_t replica, rank, lane;
  Side side;
  Phase phase;
  int64_t number, begin_ns, end_ns, bytes_read, bytes_written;
};

// One chunk as the copy engine moved it, on the clock of PhaseRecord.
struct WireRecord {
  int32_t replica, rank, peer, lane;
  Side side;
  int64_t number, begin_ns, end_ns, bytes;
};

class NvshmemMemory;
class Rank;
struct GroupState;

// Bytes of symmetric memory that each rank allocates.
int64_t SymmetricBytes(const GroupConfig& config);

// The ranks of one group, one per device of this process.
class Group {
 public:
  // The group is `replica` among those of one id, which its mesh makes along other axes.
  // `devices[r]` is the CUDA ordinal of rank r. Loads all kernels, and allocates everything that
  // the phases will need but for the sets that later programs take.
  static StatusOr<std::shared_ptr<Group>> Create(int64_t group_id, int32_t replica,
                                                 const GroupConfig& config,
                                                 const std::vector<int32_t>& devices);
  // The same for the one rank of this process, on `device`; that of rank r is in process
  // `process_of_rank[r]` of NVSHMEM's world. `memory` has SymmetricBytes(config) or more, and no
  // group of any process uses it. `name`, the same in all of them and of no other group, is where
  // they meet in /dev/shm. No rank may send before all have come back from here, and one has then
  // called AllAreHere.
  static StatusOr<std::shared_ptr<Group>> CreateAmongProcesses(
      int64_t group_id, int32_t replica, const GroupConfig& config, int32_t rank, int32_t device,
      const std::vector<int32_t>& process_of_rank, std::shared_ptr<NvshmemMemory> memory,
      const std::string& name);
  // Nothing is left under the name.
  void AllAreHere();
  ~Group();  // closes
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Lets what is under way end, for half a second; ends what waits then with an error; and gives
  // all memory back. Returns some seconds later in any case, and says what has not ended: that goes
  // on by itself, and its memory is given back when it ends. Idempotent.
  Status Close();
  // The first fault of the group, which stays, also when it is closed; or else an overflow since
  // the last Check.
  Status Check();
  // The first fault only.
  Status Fault() const;
  // When the group is closed, what was counted by then.
  StatusOr<GroupStats> stats() const;
  Memory memory() const;
  // The most recent phases of all ranks, up to some hundred per rank, in the order of their start.
  StatusOr<std::vector<PhaseRecord>> Trace() const;
  // From now on the movers note the times of their copies, up to 1024 of each rank, which costs
  // them some microseconds per copy; until EndWireTrace, which waits for these copies and returns
  // them.
  Status StartWireTrace();
  StatusOr<std::vector<WireRecord>> EndWireTrace();

 private:
  friend std::shared_ptr<Rank> FindRank(int64_t group_id, int32_t device);
  friend void CompilationEnds();
  friend Status CompileSend(const CompiledOperation& operation);
  explicit Group(std::shared_ptr<GroupState> state);
  static StatusOr<std::shared_ptr<Group>> Make(std::shared_ptr<GroupState> state,
                                               std::function<Status()> allocate);
  static StatusOr<std::shared_ptr<Group>> Register(std::shared_ptr<GroupState> state);
  std::shared_ptr<Group> Unregister();
  // The sets that programs take, unless the group is closed.
  Status MakeSets(const InFlight::Need& need);
  Status MakeSets(int32_t count);
  std::mutex close_mutex_;
  const std::shared_ptr<GroupState> state_;  // with whoever waits for the devices
};

// A compilation, on the thread that waits for it. During it, XLA creates the calls of sends and
// recvs, in the order of the program's schedule. The groups of their id, if they are open or as
// soon as they are, get the sets that the program takes (in_flight.h); it is an error if they
// cannot.
void CompilationBegins();
void CompilationEnds();
Status CompileSend(const CompiledOperation& operation);
Status CompileRecv(const CompiledOperation& operation);

// The rank of that group on `device`, or nullptr. It lives while the group does: hold the pointer.
std::shared_ptr<Rank> FindRank(int64_t group_id, int32_t device);
const GroupConfig& ConfigOf(const Rank& rank);

// What every phase needs beside its arrays. All pointers are to device memory.
struct Call {
  int64_t run = 0;  // of the program: one number on all ranks of the process
  int32_t lane = 0;
  int32_t derivation = 0;
  uint32_t call_site = 0;
  int64_t tokens = 0;                 // T
  const float* token = nullptr;       // [Token::kSize]
  const int32_t* position = nullptr;  // {rank, replica}
  float* token_out = nullptr;         // [Token::kSize]
};

Status DispatchSend(Rank& rank, const Call& call, const DispatchSendArrays& arrays,
                    cudaStream_t stream);
Status DispatchSendCached(Rank& rank, const Call& call, const DispatchSendCachedArrays& arrays,
                          cudaStream_t stream);
Status DispatchRecv(Rank& rank, const Call& call, const DispatchRecvArrays& arrays,
                    cudaStream_t stream);
Status DispatchRecvCached(Rank& rank, const Call& call, const DispatchRecvCachedArrays& arrays,
                          cudaStream_t stream);
Status CombineSend(Rank& rank, const Call& call, const CombineSendArrays& arrays,
                   cudaStream_t stream);
Status CombineRecv(Rank& rank, const Call& call, const CombineRecvArrays& arrays,
                   cudaStream_t stream);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_BACKEND_H_
