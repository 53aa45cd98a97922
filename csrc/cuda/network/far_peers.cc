// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/far_peers.h"

#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/host/mover_context.h"
#include "csrc/protocol/layout.h"

namespace smfree::cuda {

StatusOr<std::unique_ptr<FarPeers>> FarPeers::Connect(Wiring wiring) {
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  auto context = PrimaryContext(wiring.device);
  if (!context.ok()) return context.status();
  std::unique_ptr<FarPeers> peers(
      new FarPeers(std::move(wiring), *driver.value(), context.value()));
  Status status = peers->MakeStreams();
  if (status.ok()) status = peers->CallAll();
  if (!status.ok()) return status;
  return peers;
}

FarPeers::~FarPeers() {
  const ContextScope scope(driver_, context_);
  for (const cudaStream_t stream : streams_) {
    if (stream == nullptr) continue;
    wiring_.nvshmem->Quiet(stream);
    (void)cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
}

Status FarPeers::MakeStreams() {
  const ContextScope scope(driver_, context_);
  int least = 0, greatest = 0;
  Status status = CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                             "cudaDeviceGetStreamPriorityRange");
  for (const int32_t process : wiring_.process_of_rank) {
    cudaStream_t stream = nullptr;
    if (status.ok() && process != kNear) {
      status = CudaStatus(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
                          "cudaStreamCreateWithPriority");
    }
    streams_.push_back(stream);
  }
  return status;
}

Status FarPeers::CallAll() const {
  // Zeros onto zeros: the fault word there is for this group alone, and nobody has failed yet.
  for (size_t peer = 0; peer < streams_.size(); ++peer) {
    if (streams_[peer] == nullptr) continue;
    const int64_t word = wiring_.fault_word;
    Put(static_cast<int32_t>(peer), {/*first=*/false, word, word, kSignalBytes, word, 0});
    const ContextScope scope(driver_, context_);
    char* const there = wiring_.memory + word;
    wiring_.nvshmem->Set(there, 0, wiring_.process_of_rank[peer], streams_[peer]);
    wiring_.nvshmem->Quiet(streams_[peer]);
    const Status status = CudaStatus(cudaStreamSynchronize(streams_[peer]), "a put to a peer");
    if (!status.ok()) return status;
  }
  return {};
}

void FarPeers::Put(int32_t peer, const Chunk& chunk) const {
  const ContextScope scope(driver_, context_);
  const cudaStream_t stream = streams_[static_cast<size_t>(peer)];
  char* const memory = wiring_.memory;
  if (!chunk.first) wiring_.nvshmem->Quiet(stream);
  wiring_.nvshmem->PutThenSet(memory + chunk.to, memory + chunk.from,
                              static_cast<size_t>(chunk.bytes), memory + chunk.word, chunk.signal,
                              wiring_.process_of_rank[static_cast<size_t>(peer)], stream);
}

void FarPeers::TellFault(int32_t rank) const {
  const ContextScope scope(driver_, context_);
  for (size_t peer = 0; peer < streams_.size(); ++peer) {
    if (streams_[peer] == nullptr) continue;
    wiring_.nvshmem->Set(wiring_.memory + wiring_.fault_word, static_cast<uint64_t>(rank) + 1,
                         wiring_.process_of_rank[peer], streams_[peer]);
  }
}

}  // namespace smfree::cuda
