// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/far_announcements.h"

#include "csrc/protocol/signals.h"

namespace smfree::cuda {

StatusOr<std::unique_ptr<FarAnnouncements>> FarAnnouncements::Make(Wiring wiring) {
  const AnnouncementTable table = wiring.layout.Announcements(kWire);
  const size_t bytes = static_cast<size_t>(table.num_ranks) * static_cast<size_t>(table.words) *
                       sizeof(uint64_t);
  std::unique_ptr<FarAnnouncements> made(new FarAnnouncements(std::move(wiring)));
  made->sets_.resize(static_cast<size_t>(made->wiring_.layout.num_sets));
  for (Set& set : made->sets_) {
    auto words = Allocation::OnHost(bytes);
    if (!words.ok()) return words.status();
    set.words = std::move(words.value());
    const cudaError_t error = cudaEventCreateWithFlags(&set.copied, cudaEventDisableTiming);
    if (error != cudaSuccess) return CudaStatus(error, "cudaEventCreateWithFlags");
  }
  return made;
}

FarAnnouncements::~FarAnnouncements() {
  for (const Set& set : sets_) {
    if (set.copied == nullptr) continue;
    (void)cudaEventSynchronize(set.copied);
    (void)cudaEventDestroy(set.copied);
  }
}

void FarAnnouncements::Tell(int32_t set, int64_t number) {
  if (std::exchange(sets_[static_cast<size_t>(set)].told, number) == number) return;
  const int64_t first = table_.At(set, number, wiring_.rank, 0);
  const int64_t last = first + table_.words - 1;
  const int64_t here = wiring_.layout.AnnouncedOffset();
  const auto at = [&](int64_t word) { return here + word * kSignalBytes; };
  for (const int32_t peer : wiring_.far_ranks) {
    // The last word is put twice, because a put ends with one. Behind a quiet, or words of two
    // operations might overtake one another.
    wiring_.far->Put(peer, {/*first=*/false, at(first), at(first),
                            table_.words * kSignalBytes, at(last),
                            load_acquire_system(wiring_.announced + last)});
  }
}

Status FarAnnouncements::Look(int32_t set, int64_t number, cudaStream_t stream) {
  Set& mine = sets_[static_cast<size_t>(set)];
  if (mine.copying != kNoOperation) {
    const cudaError_t error = cudaEventQuery(mine.copied);
    if (error == cudaErrorNotReady) return {};
    if (error != cudaSuccess) return CudaStatus(error, "a copy of what other nodes announce");
    if (std::exchange(mine.copying, kNoOperation) == number) WriteDown(set, number);
  }
  const char* const from =
      wiring_.memory + wiring_.layout.AnnouncedOffset() +
      table_.At(set, number, 0, 0) * kSignalBytes;
  cudaError_t error = cudaMemcpyAsync(mine.words.as<void>(), from, mine.words.bytes(),
                                      cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaEventRecord(mine.copied, stream);
  if (error == cudaSuccess) mine.copying = number;
  return CudaStatus(error, "a copy of what other nodes announce");
}

// Each word vouches for itself. While this rank waits, nobody has gone on to the operation that
// takes the same words next.
void FarAnnouncements::WriteDown(int32_t set, int64_t number) const {
  const auto* const words = sets_[static_cast<size_t>(set)].words.as<uint64_t>();
  for (const int32_t rank : wiring_.far_ranks) {
    for (int32_t i = 0; i < table_.words; ++i) {
      const uint64_t word = words[int64_t{rank} * table_.words + i];
      if (!Announcement{word}.IsOf(number)) continue;
      store_release_system(wiring_.announced + table_.At(set, number, rank, i), word);
    }
  }
}

}  // namespace smfree::cuda
