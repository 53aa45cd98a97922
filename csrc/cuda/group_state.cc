// SPDX-License-Identifier: Apache-2.0
//
// The state of a group: what it allocates, and what has gone wrong.
#include <algorithm>
#include <string>
#include <utility>

#include "csrc/cuda/group.h"

namespace smfree::cuda {
namespace {

LayoutConfig LayoutConfigOf(const GroupConfig& config) {
  return {config.num_ranks,
          config.num_ranks,
          config.num_experts,
          config.top_k,
          config.num_lanes,
          static_cast<int32_t>(ItemBytes(config.dtype)),
          config.hidden,
          config.max_tokens,
          config.differentiable,
          /*hierarchical=*/false};
}

}  // namespace

LaneScratchLayout::LaneScratchLayout(const GroupConfig& config) {
  const int64_t bins = config.num_experts + config.num_ranks;
  counts_offset = AlignUp(sizeof(LaneScratch), kAlignment);
  flags_offset =
      counts_offset + AlignUp(kMaxRouteBlocks * bins * int64_t{sizeof(int32_t)}, kAlignment);
  tags_offset = flags_offset + AlignUp(kMaxRouteBlocks * int64_t{sizeof(uint64_t)}, kAlignment);
  bytes = tags_offset + AlignUp(RowsCapacity(config, config.max_tokens) * int64_t{sizeof(uint32_t)},
                                kAlignment);
}

Context Rank::ContextFor(int32_t lane_index) const {
  const GroupOptions& options = group->options;
  const LaneScratchLayout layout(options);
  char* const lane = scratch.as<char>() + lane_index * layout.bytes;
  Context c{};
  c.layout = group->layout;
  c.code = CopyCode(options.max_tokens);
  c.rank = rank;
  c.num_ranks = options.num_ranks;
  c.num_experts = options.num_experts;
  c.top_k = options.top_k;
  c.places_per_row = PlacesPerRow(options);
  c.expert_alignment = options.expert_alignment;
  c.drop_overflow = options.overflow == Overflow::kDrop;
  c.timeout_ns = static_cast<uint64_t>(options.timeout_s * 1e9);
  c.memory = memory.data();
  c.memories = peer_table.as<char*>();
  c.state = state.as<RankState>();
  c.scratch = reinterpret_cast<LaneScratch*>(lane);
  c.route_counts = reinterpret_cast<int32_t*>(lane + layout.counts_offset);
  c.route_flags = reinterpret_cast<uint64_t*>(lane + layout.flags_offset);
  c.row_tags = reinterpret_cast<uint32_t*>(lane + layout.tags_offset);
  c.queue = queue.as<Descriptor>();
  c.queue_mask = group->queue_mask;
  c.host = host.as<HostPage>();
  c.group_failed = group->failed.as<uint32_t>();
  c.hidden = options.hidden;
  c.x_row_bytes = options.hidden * ItemBytes(options.dtype);
  c.lane_index = lane_index;
  return c;
}

Status GroupState::AllocateRank(Rank& rank, const std::vector<int32_t>& devices) {
  const DeviceScope scope(rank.device);
  cudaDeviceProp properties;
  Status status =
      CudaStatus(cudaGetDeviceProperties(&properties, rank.device), "cudaGetDeviceProperties");
  if (!status.ok()) return status;
  rank.num_sms = properties.multiProcessorCount;
  const size_t route_bytes =
      RouteSharedBytes(options.max_tokens, options.num_experts, options.num_ranks);
  const size_t place_bytes = PlaceSharedBytes(options.num_experts, options.num_ranks);
  if (std::max(route_bytes, place_bytes) > properties.sharedMemPerBlockOptin) {
    return Status(FaultKind::kInvalidArgument,
                  "the routing of max_tokens " + std::to_string(options.max_tokens) +
                      " rows to " + std::to_string(options.num_experts) + " experts needs " +
                      std::to_string(route_bytes) + " bytes of shared memory, GPU " +
                      std::to_string(rank.device) + " has " +
                      std::to_string(properties.sharedMemPerBlockOptin) +
                      ". Cure: lower max_tokens, and send larger batches in several operations.");
  }
  const int64_t lanes = LaneCount(options.num_lanes, options.differentiable);
  const auto on_device = [&](Allocation& allocation, int64_t bytes) {
    auto made = Allocation::OnDevice(rank.device, static_cast<size_t>(bytes));
    if (!made.ok()) return made.status();
    allocation = std::move(made.value());
    return Status();
  };
  const auto on_host = [&](Allocation& allocation, int64_t bytes) {
    auto made = Allocation::OnHost(static_cast<size_t>(bytes));
    if (!made.ok()) return made.status();
    allocation = std::move(made.value());
    return Status();
  };
  auto memory = LocalMemory::Map(rank.device, devices, static_cast<size_t>(layout.TotalBytes()));
  if (!memory.ok()) return memory.status();
  rank.memory = std::move(memory.value());
  status = on_device(rank.state, sizeof(RankState));
  if (status.ok()) status = on_device(rank.scratch, lanes * LaneScratchLayout(options).bytes);
  if (status.ok()) status = on_device(rank.peer_table, kMaxRanks * int64_t{sizeof(char*)});
  if (status.ok()) {
    status = on_host(rank.queue, static_cast<int64_t>((queue_mask + 1) * sizeof(Descriptor)));
  }
  if (status.ok()) status = on_host(rank.host, sizeof(HostPage));
  if (status.ok()) status = CudaStatus(LoadDispatchSend(route_bytes), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadDispatchRecv(place_bytes), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadCombineSend(), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadCombineRecv(), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadReadClock(), "loading kernels");
  return status;
}

Status GroupState::Allocate(const std::vector<int32_t>& devices) {
  layout = Layout::Make(LayoutConfigOf(options));
  // Two operations per lane are in the queue at most (PROTOCOL.md, rule 4).
  const int64_t most = int64_t{LaneCount(options.num_lanes, options.differentiable)} * 2 *
                       options.num_ranks * kMaxChunks;
  uint64_t entries = 64;
  while (entries < static_cast<uint64_t>(most)) entries *= 2;
  queue_mask = entries - 1;

  launches = std::make_unique<Launches>(options.num_ranks,
                                        LaneCount(options.num_lanes, options.differentiable));

  auto made = Allocation::OnHost(sizeof(uint32_t));
  if (!made.ok()) return made.status();
  failed = std::move(made.value());
  for (size_t r = 0; r < devices.size(); ++r) {
    ranks.push_back(std::make_unique<Rank>());
    ranks[r]->rank = static_cast<int32_t>(r);
    ranks[r]->device = devices[r];
    ranks[r]->group = this;
    const Status status = AllocateRank(*ranks[r], devices);
    if (!status.ok()) return status;
  }
  std::vector<char*> memories;
  for (const auto& rank : ranks) memories.push_back(rank->memory.data());
  for (const auto& rank : ranks) {
    const DeviceScope scope(rank->device);
    Status status = CudaStatus(cudaMemcpy(rank->peer_table.as<char*>(), memories.data(),
                                   memories.size() * sizeof(char*), cudaMemcpyHostToDevice),
                        "cudaMemcpy");
    // The signals are zero on all ranks before the first send of any of them.
    if (status.ok()) status = CudaStatus(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (!status.ok()) return status;
  }
  return StartMovers(memories);
}

Status GroupState::StartMovers(const std::vector<char*>& memories) {
  if (ranks.size() == 1) return {};
  for (const auto& rank : ranks) {
    auto mover = Mover::Start({rank->device, rank->rank, options.num_lanes, layout, memories,
                               rank->queue.as<Descriptor>(), queue_mask,
                               [this](Status fault) { Fail(std::move(fault)); }});
    if (!mover.ok()) return mover.status();
    rank->mover = std::move(mover.value());
  }
  return {};
}

bool GroupState::Failed() const {
  return __atomic_load_n(failed.as<uint32_t>(), __ATOMIC_ACQUIRE) != 0;
}

void GroupState::Fail(Status fault) {
  {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    if (host_fault.ok()) host_fault = std::move(fault);
  }
  __atomic_store_n(failed.as<uint32_t>(), 1u, __ATOMIC_RELEASE);
  launches->SwitchOff();
}

Status GroupState::FirstFault() const {
  const FaultRecord* first = nullptr;
  int32_t first_rank = 0;
  for (const auto& rank : ranks) {
    const FaultRecord& fault = rank->host.as<HostPage>()->fault;
    if (__atomic_load_n(&fault.ready, __ATOMIC_ACQUIRE) == 0) continue;
    if (first != nullptr && fault.time_ns >= first->time_ns) continue;
    first = &fault;
    first_rank = rank->rank;
  }
  if (first != nullptr) return DescribeFault(*first, first_rank, options.timeout_s);
  const std::lock_guard<std::mutex> lock(fault_mutex);
  return host_fault;
}

Status GroupState::TakeOverflow() {
  Status first;
  for (const auto& rank : ranks) {
    OverflowRecord& overflow = rank->host.as<HostPage>()->overflow;
    if (__atomic_exchange_n(&overflow.ready, 0u, __ATOMIC_ACQ_REL) == 0) continue;
    if (first.ok()) first = DescribeOverflow(overflow, rank->rank);
  }
  return first;
}

}  // namespace smfree::cuda
