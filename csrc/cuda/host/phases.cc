// SPDX-License-Identifier: Apache-2.0
//
// The phases of backend.h: what a caller may ask for, and how the work is cut. In hierarchical
// mode a dispatch_recv begins with a relay, and a combine_send ends with one, which are launched as
// parts of their own: both wait for the ranks of the leg before them.
#include <algorithm>
#include <chrono>
#include <string>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cuda/host/group.h"

namespace smfree::cuda {
namespace {

// A chunk is large enough for the copy engine to run at full rate, and small enough that the wire
// starts soon and the last unpack is short. See docs/performance.md.
constexpr int64_t kChunkBytes = int64_t{16} << 20;
// A block takes a tile of rows, one piece of a row per warp. Fewer and longer pieces are better as
// long as there are so many tiles per block that no block is late at the end.
constexpr int64_t kTilesPerBlock = 3;
constexpr int32_t kBlockWarps = kThreads / 32;

// How long a part may be held back until its peers' sends are launched (launch_order.h), in
// seconds.
constexpr double kMostHeldBackS = 5;

// Whether the work goes into a CUDA graph, to be run later.
bool IsCaptured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

enum class Part { kSend, kRelay, kRecv };

// What is about to be launched.
struct Work {
  Phase phase;
  Part part;
  bool has_experts, has_slots;  // of its messages
  const RowFormat& rows;

  Operation operation() const { return OperationOf(phase); }
};

// A part under way. Holds the group open until its kernels are launched.
struct PartUnderWay {
  std::shared_lock<std::shared_mutex> open;
  KernelParams params;
  LaunchParams launch;
};

// Holds a part back until what it waits for is launched.
void Await(Rank& rank, const Work& work) {
  GroupState& group = *rank.group;
  {
    const std::shared_lock<std::shared_mutex> open(group.open_mutex, std::try_to_lock);
    if (!open.owns_lock() || group.closed || group.Failed()) return group.launch_order->SwitchOff();
  }
  const Nodes nodes = NodesOf(group.config);
  const Leg leg = work.part == Part::kRelay ? nodes.FirstLeg(work.operation())
                                            : nodes.LastLeg(work.operation());
  const auto seconds = [](double s) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(s));
  };
  const double timeout_s = group.config.timeout_s;
  group.launch_order->AwaitSends(rank.index, leg, seconds(std::min(kMostHeldBackS, timeout_s / 2)));
  if (leg != kWire) return;
  // Whatever the send stands behind on the device ends by its deadline.
  group.launch_order->AwaitPuts(rank.index, group.FarMessages(), seconds(timeout_s));
}

StatusOr<PartUnderWay> Begin(Rank& rank, const Call& call, const Work& what, cudaStream_t stream) {
  const Phase phase = what.phase;
  const Operation operation = what.operation();
  GroupState& group = *rank.group;
  const GroupConfig& config = group.config;
  Identity identity;
  identity.lane = call.lane;
  identity.derivation = call.derivation;
  identity.call_site = call.call_site;
  identity.operation = operation;
  const std::string here = DescribeCall(Name(phase), rank.rank, identity);
  const Side side = SideOf(call.derivation);
  if (side != Side::kForward && !config.differentiable) {
    return InvalidArgument(here,
                           "the group has no buffers for the backward pass. Fix: "
                           "EpConfig(differentiable=True).");
  }
  const Status sizes = CheckSizes(config, here, call.tokens, call.lane);
  if (!sizes.ok()) return sizes;
  if (what.part != Part::kSend && !IsCaptured(stream)) Await(rank, what);

  PartUnderWay work{{group.open_mutex, std::try_to_lock}, KernelParams{}, LaunchParams{}};
  if (!work.open.owns_lock() || group.closed) {
    const Status status = GroupClosed(here);
    group.Fail(status);  // ends the waits of ranks whose part was launched before
    return status;
  }
  if (!group.runs.Admit(call.run, [&] { return group.Failed(); })) {
    return FailedBefore(here, group.FirstFault());
  }

  GroupConstants& g = work.params.g;
  OperationParams& op = work.params.op;
  g = rank.Constants();
  work.params.sets = rank.Sets();
  op.phase = phase;
  op.operation = operation;
  op.lane = call.lane;
  op.derivation = call.derivation;
  op.call_site = call.call_site;
  op.tokens = static_cast<int32_t>(call.tokens);
  op.experts = what.has_experts ? config.top_k : 0;
  op.slots = what.has_slots ? config.top_k : 0;
  op.row_bytes = what.rows.bytes();
  op.stride = what.rows.stride;
  const int64_t message_bytes = call.tokens * op.stride;
  op.in_areas = g.layout.UsesAreas(call.tokens);
  op.push = IsPushed(config, g.layout, call.tokens, op.stride);
  op.wire_rows = static_cast<int32_t>(WireRows(config, call.tokens));
  // No leg has more messages than there are ranks.
  const int64_t most_chunks = std::min(kMaxChunks, kMaxChunksOfLeg / config.num_ranks);
  op.chunks = op.push ? 1
                      : static_cast<int32_t>(std::clamp<int64_t>(
                            (message_bytes + kChunkBytes - 1) / kChunkBytes, 1, most_chunks));
  op.pieces = 1;
  while (op.pieces < kBlockWarps && op.row_bytes >= int64_t{512} * 2 * op.pieces &&
         call.tokens * op.pieces < kTilesPerBlock * kBlockWarps * rank.num_sms * kBlocksPerSm) {
    op.pieces *= 2;
  }
  op.position = call.position;
  op.token = call.token;
  op.token_out = call.token_out;
  work.launch = {stream, rank.num_sms, IsFused(config, g.layout, call.tokens, op.stride)};
  if (rank.mover) rank.mover->Wake();
  return work;
}

// The other ranks wait for what was launched, or are told that it was not.
Status End(Rank& rank, const PartUnderWay& work, const Work& what, cudaError_t error) {
  const Status status = CudaStatus(error, "a kernel could not be launched");
  if (!status.ok()) {
    rank.group->Fail(status);
  } else if (what.part != Part::kRecv && !IsCaptured(work.launch.stream)) {
    const Nodes nodes = NodesOf(rank.group->config);
    const Leg leg = what.part == Part::kSend ? nodes.FirstLeg(what.operation())
                                             : nodes.LastLeg(what.operation());
    rank.group->launch_order->NoteSend(rank.index, leg);
  }
  return status;
}

bool SendsOnWire(const Rank& rank, const Work& work) {
  const Nodes nodes = NodesOf(rank.group->config);
  return (work.part == Part::kSend && nodes.FirstLeg(work.operation()) == kWire) ||
         (work.part == Part::kRelay && nodes.LastLeg(work.operation()) == kWire);
}

// Launches a part: `launch(params, arrays, …)`.
template <typename Arrays, typename LaunchPart>
Status Run(Rank& rank, const Call& call, const Work& what, const Arrays& arrays,
           cudaStream_t stream, const LaunchPart& launch) {
  auto work = Begin(rank, call, what, stream);
  if (!work.ok()) return work.status();
  const KernelParams& params = work.value().params;
  cudaError_t error = launch(params, arrays, work.value().launch);
  if (error == cudaSuccess && SendsOnWire(rank, what) && params.g.puts_on_device) {
    error = rank.group->put_kernel->Launch(params, stream);
  }
  return End(rank, work.value(), what, error);
}

bool IsHierarchical(const Rank& rank) { return rank.group->config.hierarchical; }

}  // namespace

Status DispatchSend(Rank& rank, const Call& call, const DispatchSendArrays& arrays,
                    cudaStream_t stream) {
  return Run(rank, call, {Phase::kDispatchSend, Part::kSend, true, true, arrays.x.format}, arrays,
             stream, LaunchDispatchSend);
}

Status DispatchSendCached(Rank& rank, const Call& call, const DispatchSendCachedArrays& arrays,
                          cudaStream_t stream) {
  const bool has_slots = arrays.slots != nullptr;
  return Run(rank, call, {Phase::kDispatchSend, Part::kSend, false, has_slots, arrays.x.format},
             arrays, stream, LaunchDispatchSendCached);
}

Status DispatchRecv(Rank& rank, const Call& call, const DispatchRecvArrays& arrays,
                    cudaStream_t stream) {
  Work work{Phase::kDispatchRecv, Part::kRelay, true, true, arrays.x.format};
  if (IsHierarchical(rank)) {
    const Status status = Run(rank, call, work, arrays, stream, LaunchDispatchRelay);
    if (!status.ok()) return status;
  }
  work.part = Part::kRecv;
  return Run(rank, call, work, arrays, stream, LaunchDispatchRecv);
}

Status DispatchRecvCached(Rank& rank, const Call& call, const DispatchRecvCachedArrays& arrays,
                          cudaStream_t stream) {
  const bool has_slots = arrays.values != nullptr && arrays.w == nullptr;
  Work work{Phase::kDispatchRecv, Part::kRelay, false, has_slots, arrays.x.format};
  if (IsHierarchical(rank)) {
    const Status status = Run(rank, call, work, arrays, stream, LaunchDispatchRelayCached);
    if (!status.ok()) return status;
  }
  work.part = Part::kRecv;
  return Run(rank, call, work, arrays, stream, LaunchDispatchRecvCached);
}

Status CombineSend(Rank& rank, const Call& call, const CombineSendArrays& arrays,
                   cudaStream_t stream) {
  Work work{Phase::kCombineSend, Part::kSend, false, arrays.values != nullptr, arrays.y.format};
  const Status status = Run(rank, call, work, arrays, stream, LaunchCombineSend);
  if (!status.ok() || !IsHierarchical(rank)) return status;
  work.part = Part::kRelay;
  return Run(rank, call, work, arrays, stream, LaunchCombineRelay);
}

Status CombineRecv(Rank& rank, const Call& call, const CombineRecvArrays& arrays,
                   cudaStream_t stream) {
  const bool has_slots = arrays.slots != nullptr;
  return Run(rank, call, {Phase::kCombineRecv, Part::kRecv, false, has_slots, arrays.out.format},
             arrays, stream, LaunchCombineRecv);
}

}  // namespace smfree::cuda
