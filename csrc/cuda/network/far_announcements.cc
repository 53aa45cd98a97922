// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/far_announcements.h"

#include "csrc/protocol/signals.h"

namespace smfree::cuda {

StatusOr<std::unique_ptr<FarAnnouncements>> FarAnnouncements::Make(Wiring wiring) {
  const AnnouncementTable table = wiring.layout.Announcements(kWire);
  const int64_t words = int64_t{table.num_ranks} * table.words;
  auto copy = Allocation::OnHost(static_cast<size_t>(words) * sizeof(uint64_t));
  if (!copy.ok()) return copy.status();
  std::unique_ptr<FarAnnouncements> made(new FarAnnouncements(std::move(wiring)));
  made->copy_ = std::move(copy.value());
  return made;
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
  if (copying_) {
    const cudaError_t error = cudaStreamQuery(stream);
    if (error == cudaErrorNotReady) return {};
    if (error != cudaSuccess) return CudaStatus(error, "a copy of what other nodes announce");
    copying_ = false;
    WriteDown(set, number);
  }
  const char* const from =
      wiring_.memory + wiring_.layout.AnnouncedOffset() +
      table_.At(set, number, 0, 0) * static_cast<int64_t>(sizeof(uint64_t));
  const Status status =
      CudaStatus(cudaMemcpyAsync(copy_.as<void>(), from, copy_.bytes(), cudaMemcpyDeviceToHost,
                                 stream),
                 "a copy of what other nodes announce");
  copying_ = status.ok();
  return status;
}

// Each word vouches for itself. What was copied for an earlier operation, or another set, is left
// out: this rank has gone on since, and so may others have.
void FarAnnouncements::WriteDown(int32_t set, int64_t number) const {
  const auto* const words = copy_.as<uint64_t>();
  for (const int32_t rank : wiring_.far_ranks) {
    for (int32_t i = 0; i < table_.words; ++i) {
      const uint64_t word = words[int64_t{rank} * table_.words + i];
      if (!Announcement{word}.IsOf(number)) continue;
      store_release_system(wiring_.announced + table_.At(set, number, rank, i), word);
    }
  }
}

}  // namespace smfree::cuda
