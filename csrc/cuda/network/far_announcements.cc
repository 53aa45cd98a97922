// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/far_announcements.h"

#include "csrc/protocol/signals.h"

namespace smfree::cuda {

StatusOr<std::unique_ptr<FarAnnouncements>> FarAnnouncements::Make(Wiring wiring,
                                                                   int32_t num_sets) {
  const AnnouncementTable table = wiring.layout.Announcements(kWire);
  const size_t bytes = static_cast<size_t>(table.num_ranks) * static_cast<size_t>(table.words) *
                       sizeof(uint64_t);
  std::unique_ptr<FarAnnouncements> made(new FarAnnouncements(std::move(wiring)));
  made->copies_.resize(static_cast<size_t>(num_sets));
  for (Copy& copy : made->copies_) {
    auto words = Allocation::OnHost(bytes);
    if (!words.ok()) return words.status();
    copy.words = std::move(words.value());
    const cudaError_t error = cudaEventCreateWithFlags(&copy.done, cudaEventDisableTiming);
    if (error != cudaSuccess) return CudaStatus(error, "cudaEventCreateWithFlags");
  }
  return made;
}

FarAnnouncements::~FarAnnouncements() {
  for (const Copy& copy : copies_) {
    if (copy.done == nullptr) continue;
    (void)cudaEventSynchronize(copy.done);
    (void)cudaEventDestroy(copy.done);
  }
}

void FarAnnouncements::Tell(int32_t set, int64_t number) const {
  const int64_t first = table_.At(set, number, wiring_.rank, 0);
  const int64_t last = first + table_.words - 1;
  const int64_t here = wiring_.layout.AnnouncedOffset();
  const auto at = [&](int64_t word) { return here + word * static_cast<int64_t>(sizeof(uint64_t)); };
  for (const int32_t peer : wiring_.far_ranks) {
    // The last word is put twice, because a put ends with one. Behind a quiet, or words of two
    // operations might overtake one another.
    wiring_.far->Put(peer, {/*first=*/false, at(first), at(first),
                            table_.words * static_cast<int64_t>(sizeof(uint64_t)), at(last),
                            load_acquire_system(wiring_.announced + last)});
  }
}

Status FarAnnouncements::Look(int32_t set, int64_t number, cudaStream_t stream) {
  Copy& copy = copies_[static_cast<size_t>(set)];
  if (copy.number != kNoOperation) {
    const cudaError_t error = cudaEventQuery(copy.done);
    if (error == cudaErrorNotReady) return {};
    if (error != cudaSuccess) return CudaStatus(error, "a copy of what other nodes announce");
    if (std::exchange(copy.number, kNoOperation) == number) WriteDown(set, number);
  }
  const char* const from =
      wiring_.memory + wiring_.layout.AnnouncedOffset() +
      table_.At(set, number, 0, 0) * static_cast<int64_t>(sizeof(uint64_t));
  cudaError_t error = cudaMemcpyAsync(copy.words.as<void>(), from, copy.words.bytes(),
                                      cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaEventRecord(copy.done, stream);
  if (error == cudaSuccess) copy.number = number;
  return CudaStatus(error, "a copy of what other nodes announce");
}

// Each word vouches for itself. While this rank waits, nobody has gone on to the operation that
// takes the same words next.
void FarAnnouncements::WriteDown(int32_t set, int64_t number) const {
  const auto* const words = copies_[static_cast<size_t>(set)].words.as<uint64_t>();
  for (const int32_t rank : wiring_.far_ranks) {
    for (int32_t i = 0; i < table_.words; ++i) {
      const uint64_t word = words[int64_t{rank} * table_.words + i];
      if (!Announcement{word}.IsOf(number)) continue;
      store_release_system(wiring_.announced + table_.At(set, number, rank, i), word);
    }
  }
}

}  // namespace smfree::cuda
