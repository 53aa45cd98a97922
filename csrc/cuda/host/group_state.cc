// SPDX-License-Identifier: Apache-2.0
//
// The state of a group: what it allocates, and what has gone wrong.
#include <algorithm>
#include <string>
#include <utility>

#include "csrc/cuda/host/group.h"
#include "csrc/cuda/memory/memory_local.h"

namespace smfree::cuda {
namespace {

// A recv reads what a network card has written to `device` while the kernel runs. On GPUs that keep
// the order of such writes, a signal that is seen vouches for the bytes before it; others would
// need a flush from the host.
Status CheckNetworkOrder(int32_t device) {
  int order = 0;
  const Status status = CudaStatus(
      cudaDeviceGetAttribute(&order, cudaDevAttrGPUDirectRDMAWritesOrdering, device),
      "cudaDeviceGetAttribute");
  if (!status.ok() || order >= cudaGPUDirectRDMAWritesOrderingOwner) return status;
  return Status(FaultKind::kInvalidArgument,
                "GPU " + std::to_string(device) +
                    " does not keep the order in which a network card writes to it (GPUDirect RDMA "
                    "writes ordering " + std::to_string(order) + ", expected " +
                    std::to_string(cudaGPUDirectRDMAWritesOrderingOwner) +
                    " or more). Fix: make the group of GPUs that NVLink connects, or use GPUs of "
                    "compute capability 9.0 or newer.");
}

}  // namespace

int64_t SymmetricBytes(const GroupConfig& config) {
  return Layout::Make(config).TotalBytes();
}

SetScratchLayout::SetScratchLayout(const GroupConfig& config) {
  const Nodes nodes = NodesOf(config);
  const int64_t bins = RouteBins(nodes, config.num_experts);
  const int64_t wire_places =
      config.hierarchical ? config.max_tokens * WirePlacesPerRow(config) : 0;
  counts_offset = AlignUp(sizeof(SetScratch), kAlignment);
  flags_offset =
      counts_offset + AlignUp(kMaxRouteBlocks * bins * int64_t{sizeof(int32_t)}, kAlignment);
  tags_offset = flags_offset + AlignUp(kMaxRouteBlocks * int64_t{sizeof(uint64_t)}, kAlignment);
  wire_places_offset =
      tags_offset + AlignUp(RowsCapacity(config, config.max_tokens) * int64_t{sizeof(uint32_t)},
                            kAlignment);
  bytes = wire_places_offset + AlignUp(wire_places * int64_t{sizeof(int32_t)}, kAlignment);
}

GroupConstants Rank::Constants() const {
  const GroupConfig& config = group->config;
  GroupConstants g{};
  g.layout = group->layout;
  g.code = CopyCode(config.max_tokens);
  g.nodes = NodesOf(config);
  g.rank = rank;
  g.num_ranks = config.num_ranks;
  g.num_experts = config.num_experts;
  g.top_k = config.top_k;
  g.places_per_row = PlacesPerRow(config);
  g.wire_width = WirePlacesPerRow(config);
  g.relay_width = PlacesPerNode(config);
  g.expert_alignment = config.expert_alignment;
  g.padded_groups = config.padded_groups;
  g.drop_overflow = config.overflow == Overflow::kDrop;
  g.among_processes = group->nvshmem_memory != nullptr;
  g.puts_on_device = group->put_kernel != nullptr;
  g.timeout_ns = Nanoseconds(config.timeout_s);
  g.memory = memory->data();
  g.memories = peer_table.as<char*>();
  g.state = state.as<RankState>();
  g.queue = queue.as<Descriptor>();
  g.queue_mask = group->queue_mask;
  g.host = host.as<HostPage>();
  g.group_failed = group->failed.as<uint32_t>();
  g.announced = group->announcements.on_device();
  return g;
}

SetsOfRank Rank::Sets() const {
  const SetScratchLayout layout(group->config);
  return {group->layout.num_sets, scratch.as<char>(),   layout.bytes,
          layout.counts_offset,   layout.flags_offset,  layout.tags_offset,
          layout.wire_places_offset};
}

Status GroupState::Prepare(const std::string& name, int32_t most_sets) {
  layout = Layout::Make(config, most_sets);
  // Two operations per set are in the queue at most (PROTOCOL.md, rule 4).
  const int64_t messages = layout.peers[kWire] + layout.peers[kNode];
  const int64_t most = int64_t{most_sets} * 2 * messages * kMaxChunks;
  uint64_t entries = 64;
  while (entries < static_cast<uint64_t>(most)) entries *= 2;
  queue_mask = entries - 1;
  auto made = Allocation::OnHost(sizeof(uint32_t));
  if (!made.ok()) return made.status();
  failed = std::move(made.value());
  sizes.pinned_bytes = static_cast<int64_t>(failed.bytes());
  if (!layout.HasAreas()) return {};
  auto mapped = Announcements::Map(static_cast<size_t>(layout.AnnouncementsBytes()), name);
  if (!mapped.ok()) return mapped.status();
  announcements = std::move(mapped.value());
  sizes.pinned_bytes += static_cast<int64_t>(announcements.bytes());
  return {};
}

Status GroupState::AllocateHere(const std::vector<int32_t>& devices) {
  Status status = Prepare("", kMaxSets);
  for (size_t r = 0; status.ok() && r < devices.size(); ++r) {
    auto memory =
        LocalMemory::Reserve(devices[r], devices, static_cast<size_t>(layout.TotalBytes()));
    if (!memory.ok()) return memory.status();
    memories.push_back(memory.value()->data());
    status = AllocateRank(static_cast<int32_t>(r), devices[r], std::move(memory.value()));
  }
  if (status.ok()) status = MakeSets(FirstSets(config));
  return status.ok() ? Connect() : status;
}

Status GroupState::MakeSets(int32_t count) {
  const std::lock_guard<std::mutex> lock(sets_mutex);
  if (count <= num_sets) return {};
  int64_t device_bytes = 0;
  for (const auto& rank : ranks) {
    const Status status = rank->memory->Grow(static_cast<size_t>(layout.BytesOfSets(count)));
    if (!status.ok()) return status;
    device_bytes += static_cast<int64_t>(rank->memory->bytes());
  }
  // Where a CUDA graph that was captured before sees it, too.
  for (const auto& rank : ranks) {
    const Status status = OnOwnStream(rank->device, "the number of sets", [&](cudaStream_t stream) {
      return cudaMemcpyAsync(&rank->state.as<RankState>()->num_sets, &count, sizeof(count),
                             cudaMemcpyHostToDevice, stream);
    });
    if (!status.ok()) return status;
  }
  if (num_sets == 0) first_sets = count;
  num_sets = count;
  const std::lock_guard<std::mutex> reading(sizes_mutex);
  sizes.device_bytes = device_bytes;
  return {};
}

Status GroupState::AllocateAmongProcesses(int32_t rank, int32_t device,
                                          std::shared_ptr<NvshmemMemory> memory,
                                          const std::vector<int32_t>& process_of_rank,
                                          const std::string& name) {
  const Nodes nodes = NodesOf(config);
  Status status = Prepare(name + "-" + std::to_string(nodes.NodeOf(rank)), NumSets(config));
  if (status.ok()) status = FindPeers(rank, device, *memory, process_of_rank);
  if (!status.ok()) return status;
  nvshmem_memory = std::move(memory);
  status = AllocateRank(rank, device, nvshmem_memory);
  if (status.ok()) {
    // The signals are zero on all ranks before the first send of any of them.
    const DeviceScope scope(device);
    status = CudaStatus(cudaMemset(nvshmem_memory->data(), 0, nvshmem_memory->bytes()),
                        "cudaMemset");
  }
  if (status.ok()) status = MakeSets(layout.num_sets);
  return status.ok() ? Connect() : status;
}

Status GroupState::FindPeers(int32_t rank, int32_t device, const NvshmemMemory& memory,
                             const std::vector<int32_t>& process_of_rank) {
  const Nodes nodes = NodesOf(config);
  for (int32_t r = 0; r < config.num_ranks; ++r) {
    const int32_t process = process_of_rank[static_cast<size_t>(r)];
    char* const there = r == rank ? memory.data() : memory.At(process);
    const bool near = nodes.NodeOf(r) == nodes.NodeOf(rank);
    if (near && there == nullptr) {
      return Status(FaultKind::kInvalidArgument,
                    "rank " + std::to_string(rank) + " does not reach the GPU of rank " +
                        std::to_string(r) + " (process " + std::to_string(process) +
                        ") of its node over NVLink. Fix: set EpConfig.ranks_per_node to the "
                        "number of GPUs that reach one another (nvidia-smi topo -p2p r), 1 if none "
                        "do.");
    }
    if (there == nullptr) {
      const Status status = CheckNetworkOrder(device);
      if (!status.ok()) return status;
    }
    memories.push_back(near ? there : nullptr);
    far_processes.push_back(near ? FarPeers::kNear : process);
  }
  return {};
}

bool GroupState::HasFarPeers() const {
  return std::find(memories.begin(), memories.end(), nullptr) != memories.end();
}

int32_t GroupState::FarMessages() const {
  const Nodes nodes = NodesOf(config);
  if (!HasFarPeers() || put_kernel) return 0;
  return nodes.Regions(kWire) - (config.hierarchical ? 1 : nodes.ranks_per_node);
}

Status GroupState::AllocateRank(int32_t number, int32_t device,
                                std::shared_ptr<SymmetricMemory> memory) {
  ranks.push_back(std::make_unique<Rank>());
  Rank* const rank = ranks.back().get();
  rank->rank = number;
  rank->device = device;
  rank->group = this;
  rank->memory = std::move(memory);
  const DeviceScope scope(device);
  cudaDeviceProp properties;
  Status status =
      CudaStatus(cudaGetDeviceProperties(&properties, rank->device), "cudaGetDeviceProperties");
  if (!status.ok()) return status;
  rank->num_sms = properties.multiProcessorCount - (HasFarPeers() ? 1 : 0);
  const size_t route_bytes =
      RouteSharedBytes(config.max_tokens, RouteBins(NodesOf(config), config.num_experts),
                       rank->num_sms);
  const size_t place_bytes = PlaceSharedBytes(config.num_experts, config.num_ranks);
  if (std::max(route_bytes, place_bytes) > properties.sharedMemPerBlockOptin) {
    return Status(FaultKind::kInvalidArgument,
                  "the routing of max_tokens " + std::to_string(config.max_tokens) +
                      " rows to " + std::to_string(config.num_experts) + " experts needs " +
                      std::to_string(route_bytes) + " bytes of shared memory, GPU " +
                      std::to_string(rank->device) + " has " +
                      std::to_string(properties.sharedMemPerBlockOptin) +
                      ". Fix: lower max_tokens, and send larger batches in several operations.");
  }
  const auto on_device = [&](Allocation& allocation, int64_t bytes) {
    auto made = Allocation::OnDevice(rank->device, static_cast<size_t>(bytes));
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
  status = on_device(rank->state, sizeof(RankState));
  if (status.ok()) {
    status = on_device(rank->scratch, layout.num_sets * SetScratchLayout(config).bytes);
  }
  if (status.ok()) status = on_device(rank->peer_table, kMaxRanks * int64_t{sizeof(char*)});
  if (status.ok()) {
    status = on_host(rank->queue, static_cast<int64_t>((queue_mask + 1) * sizeof(Descriptor)));
  }
  if (status.ok()) status = on_host(rank->host, sizeof(HostPage));
  if (status.ok()) status = CudaStatus(LoadDispatchSend(route_bytes), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadDispatchRecv(place_bytes), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadCombineSend(), "loading kernels");
  if (status.ok()) status = CudaStatus(LoadCombineRecv(), "loading kernels");
  if (status.ok() && config.hierarchical) {
    status = CudaStatus(LoadDispatchRelay(), "loading kernels");
    if (status.ok()) status = CudaStatus(LoadCombineRelay(), "loading kernels");
  }
  if (status.ok()) status = CudaStatus(LoadReadClock(), "loading kernels");
  sizes.scratch_bytes += static_cast<int64_t>(rank->scratch.bytes() + rank->state.bytes() +
                                              rank->peer_table.bytes());
  sizes.pinned_bytes += static_cast<int64_t>(rank->queue.bytes() + rank->host.bytes());
  return status;
}

Status GroupState::Connect() {
  launch_order = std::make_unique<LaunchOrder>(static_cast<int32_t>(ranks.size()));
  for (size_t i = 0; i < ranks.size(); ++i) {
    Rank& rank = *ranks[i];
    rank.index = static_cast<int32_t>(i);
    const DeviceScope scope(rank.device);
    Status status = CudaStatus(cudaMemcpy(rank.peer_table.as<char*>(), memories.data(),
                                          memories.size() * sizeof(char*), cudaMemcpyHostToDevice),
                               "cudaMemcpy");
    // All that was set and copied here, and nothing else that runs on the device.
    if (status.ok()) status = CudaStatus(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    if (!status.ok()) return status;
  }
  for (const auto& rank : ranks) {
    if (config.num_ranks == 1) break;
    std::unique_ptr<FarPeers> far;
    if (HasFarPeers()) {
      auto made =
          FarPeers::Connect({rank->device, &nvshmem_memory->nvshmem(), nvshmem_memory->data(),
                             layout.FaultWordOffset(), far_processes});
      if (!made.ok()) return made.status();
      far = std::move(made.value());
      if (config.puts_on_device) {
        auto loaded = PutKernel::Load(nvshmem_memory->nvshmem(), rank->device, far_processes);
        if (!loaded.ok()) return loaded.status();
        put_kernel = std::move(loaded.value());
      }
    }
    auto mover = Mover::Start({rank->device, rank->rank, config, layout,
                               announcements.on_host(),
                               memories, std::move(far), rank->queue.as<Descriptor>(), queue_mask,
                               &rank->host.as<HostPage>()->fault,
                               [this, index = rank->index] { launch_order->NotePut(index); },
                               [this] { launch_order->SwitchOff(); },
                               [this](Status fault) { Fail(std::move(fault)); }});
    if (!mover.ok()) return mover.status();
    rank->mover = std::move(mover.value());
  }
  return {};
}

bool GroupState::Failed() const {
  // Under the lock, because Release takes the word away, and others ask while it does.
  const std::lock_guard<std::mutex> lock(fault_mutex);
  const auto* const word = failed.as<uint32_t>();
  return word == nullptr ? !host_fault.ok() : __atomic_load_n(word, __ATOMIC_ACQUIRE) != 0;
}

void GroupState::Fail(Status fault) {
  {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    if (failed.as<uint32_t>() == nullptr) return;  // released: nobody waits any more
    if (host_fault.ok()) host_fault = std::move(fault);
    __atomic_store_n(failed.as<uint32_t>(), 1u, __ATOMIC_RELEASE);
  }
  launch_order->SwitchOff();
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
  if (first != nullptr) return DescribeFault(*first, first_rank, config.timeout_s);
  const std::lock_guard<std::mutex> lock(fault_mutex);
  return host_fault;
}

Status GroupState::TakeOverflow() {
  Status first;
  for (const auto& rank : ranks) {
    OverflowRecord& overflow = rank->host.as<HostPage>()->overflow;
    if (__atomic_exchange_n(&overflow.ready, 0u, __ATOMIC_ACQ_REL) == 0) continue;
    if (first.ok()) first = DescribeOverflow(overflow, rank->rank, config);
  }
  return first;
}

}  // namespace smfree::cuda
