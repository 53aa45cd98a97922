// SPDX-License-Identifier: Apache-2.0
//
// The phases of backend.h: what a caller may ask for, and how the work is cut.
#include <algorithm>
#include <chrono>
#include <string>

#include "csrc/cuda/group.h"
#include "csrc/protocol/describe.h"

namespace smfree::cuda {
namespace {

// A chunk is large enough for the copy engine to run at full rate, and small enough that the wire
// starts soon and the last unpack is short. See docs/performance.md.
constexpr int64_t kChunkBytes = int64_t{16} << 20;
// A block takes a tile of rows, one piece of a row per warp. Fewer and longer pieces are better as
// long as there are so many tiles per block that no block is late at the end.
constexpr int64_t kTilesPerBlock = 3;
constexpr int32_t kBlockWarps = kThreads / 32;

// How long a recv may be held back until its peers' sends are launched (launches.h), in seconds.
constexpr double kMostHeldBackS = 5;

// Whether the work goes into a CUDA graph, to be run later.
bool IsCaptured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

// A phase under way. Holds the group open until its kernels are launched.
struct Launching {
  std::shared_lock<std::shared_mutex> open;
  Context context;
  Launch launch;
};

StatusOr<Launching> Begin(Rank& rank, const Call& call, Phase phase, Operation operation,
                          bool has_experts, bool has_slots, cudaStream_t stream) {
  GroupState& group = *rank.group;
  const GroupOptions& options = group.options;
  Identity identity;
  identity.lane = call.lane;
  identity.derivation = call.derivation;
  identity.call_site = call.call_site;
  identity.operation = operation;
  const auto refuse = [&](FaultKind kind, const std::string& why) {
    return Status(kind, DescribeCall(Name(phase), rank.rank, identity) + why);
  };
  const Side side = SideOf(call.derivation);
  if (side != Side::kForward && !options.differentiable) {
    return refuse(FaultKind::kInvalidArgument,
                  ": the group has no buffers for the backward pass. Cure: "
                  "EpConfig(differentiable=True).");
  }
  if (call.tokens < 1 || call.tokens > options.max_tokens || call.lane < 0 ||
      call.lane >= options.num_lanes) {
    return refuse(FaultKind::kInvalidArgument,
                  ": got " + std::to_string(call.tokens) + " rows on lane " +
                      std::to_string(call.lane) + ", expected up to " +
                      std::to_string(options.max_tokens) + " and lanes below " +
                      std::to_string(options.num_lanes) +
                      "; the program was compiled for another EpConfig. Compile it again.");
  }
  const int32_t lane_index = LaneIndex(call.lane, side, options.num_lanes);
  if (!IsSend(phase) && !IsCaptured(stream)) {
    const std::chrono::duration<double> bound(std::min(kMostHeldBackS, options.timeout_s / 2));
    group.launches->AwaitSends(rank.index, lane_index,
                               std::chrono::duration_cast<std::chrono::nanoseconds>(bound));
    // Whatever the send stands behind on the device ends by its deadline.
    const std::chrono::duration<double> deadline(options.timeout_s);
    group.launches->AwaitPuts(rank.index, lane_index, group.FarMessages(),
                              std::chrono::duration_cast<std::chrono::nanoseconds>(deadline));
  }

  Launching work{std::shared_lock<std::shared_mutex>(group.open_mutex), Context{}, Launch{}};
  if (group.closed) {
    const Status status = refuse(FaultKind::kClosed,
                                 ": the group is closed. Cure: close it after the last operation.");
    group.Fail(status);  // ends the waits of ranks whose part was launched before
    return status;
  }
  if (group.Failed()) {
    group.launches->SwitchOff();
    const Status fault = group.FirstFault();
    if (!fault.ok()) {
      return refuse(fault.kind(),
                    " cannot go on, the group has failed before: " + fault.message());
    }
  }

  Context& c = work.context;
  c = rank.ContextFor(lane_index);
  c.phase = phase;
  c.operation = operation;
  c.lane = call.lane;
  c.derivation = call.derivation;
  c.call_site = call.call_site;
  c.tokens = static_cast<int32_t>(call.tokens);
  c.experts = has_experts ? options.top_k : 0;
  c.slots = has_slots ? options.top_k : 0;
  const int64_t message_bytes = call.tokens * c.layout.row_bytes;
  c.push = message_bytes <= options.sm_push_bytes;
  c.chunks = c.push ? 1
                    : static_cast<int32_t>(std::clamp<int64_t>(
                          (message_bytes + kChunkBytes - 1) / kChunkBytes, 1, kMaxChunks));
  c.pieces = 1;
  while (c.pieces < kBlockWarps && c.x_row_bytes >= int64_t{512} * 2 * c.pieces &&
         call.tokens * c.pieces < kTilesPerBlock * kBlockWarps * rank.num_sms * kBlocksPerSm) {
    c.pieces *= 2;
  }
  c.position = call.position;
  c.token = call.token;
  c.token_out = call.token_out;
  work.launch = {stream, rank.num_sms, options.dtype};
  if (rank.mover) rank.mover->Wake();
  return work;
}

// The other ranks wait for what was launched, or are told that it was not.
Status End(Rank& rank, const Launching& work, cudaError_t error) {
  const Status status = CudaStatus(error, "a kernel could not be launched");
  if (!status.ok()) {
    rank.group->Fail(status);
  } else if (IsSend(work.context.phase) && !IsCaptured(work.launch.stream)) {
    rank.group->launches->NoteSend(rank.index, work.context.lane_index);
  }
  return status;
}

}  // namespace

Status DispatchSend(Rank& rank, const Call& call, const DispatchSendArrays& arrays,
                    cudaStream_t stream) {
  auto work = Begin(rank, call, Phase::kDispatchSend, Operation::kDispatch, /*has_experts=*/true,
                    /*has_slots=*/true, stream);
  if (!work.ok()) return work.status();
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchDispatchSend(context, arrays, launch));
}

Status DispatchSendCached(Rank& rank, const Call& call, const DispatchSendCachedArrays& arrays,
                          cudaStream_t stream) {
  auto work = Begin(rank, call, Phase::kDispatchSend, Operation::kDispatch, /*has_experts=*/false,
                    /*has_slots=*/arrays.slots != nullptr, stream);
  if (!work.ok()) return work.status();
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchDispatchSendCached(context, arrays, launch));
}

Status DispatchRecv(Rank& rank, const Call& call, const DispatchRecvArrays& arrays,
                    cudaStream_t stream) {
  auto work = Begin(rank, call, Phase::kDispatchRecv, Operation::kDispatch, /*has_experts=*/true,
                    /*has_slots=*/true, stream);
  if (!work.ok()) return work.status();
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchDispatchRecv(context, arrays, launch));
}

Status DispatchRecvCached(Rank& rank, const Call& call, const DispatchRecvCachedArrays& arrays,
                          cudaStream_t stream) {
  const bool weighted = arrays.w != nullptr;
  auto work = Begin(rank, call, Phase::kDispatchRecv, Operation::kDispatch, /*has_experts=*/false,
                    /*has_slots=*/arrays.values != nullptr && !weighted, stream);
  if (!work.ok()) return work.status();
  if (weighted) work.value().context.pieces = 1;  // a warp sums over the whole row
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchDispatchRecvCached(context, arrays, launch));
}

Status CombineSend(Rank& rank, const Call& call, const CombineSendArrays& arrays,
                   cudaStream_t stream) {
  auto work = Begin(rank, call, Phase::kCombineSend, Operation::kCombine, /*has_experts=*/false,
                    /*has_slots=*/arrays.values != nullptr, stream);
  if (!work.ok()) return work.status();
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchCombineSend(context, arrays, launch));
}

Status CombineRecv(Rank& rank, const Call& call, const CombineRecvArrays& arrays,
                   cudaStream_t stream) {
  auto work = Begin(rank, call, Phase::kCombineRecv, Operation::kCombine, /*has_experts=*/false,
                    /*has_slots=*/arrays.slots != nullptr, stream);
  if (!work.ok()) return work.status();
  const auto& [_, context, launch] = work.value();
  return End(rank, work.value(), LaunchCombineRecv(context, arrays, launch));
}

}  // namespace smfree::cuda
