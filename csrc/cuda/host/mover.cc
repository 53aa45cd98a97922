// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/mover.h"

#include <sys/prctl.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/host/mover_context.h"
#include "csrc/protocol/message.h"
#include "csrc/protocol/signals.h"

namespace smfree::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// How long to sleep after having found nothing for `idle`: not at all while operations follow one
// another, then a growing fraction of the time that has gone by, so that a first operation after a
// pause is late by a hundredth of the pause, at most a millisecond.
std::chrono::microseconds NapAfter(Clock::duration idle) {
  using std::chrono::microseconds;
  const auto us = std::chrono::duration_cast<microseconds>(idle).count();
  if (us < 2000) return microseconds(0);
  return microseconds(us < 100'000 ? us / 100 : 1000);
}

}  // namespace

StatusOr<std::unique_ptr<Mover>> Mover::Start(Wiring wiring) {
  auto driver = Driver::Get();
  if (!driver.ok()) return driver.status();
  auto context = MoverContext(wiring.device);
  if (!context.ok()) return context.status();
  std::unique_ptr<Mover> mover(new Mover(std::move(wiring), *driver.value(), context.value()));
  const ContextScope scope(*driver.value(), context.value());
  int least = 0, greatest = 0;
  Status status = CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                             "cudaDeviceGetStreamPriorityRange");
  for (size_t peer = 0; status.ok() && peer < mover->wiring_.memories.size(); ++peer) {
    cudaStream_t stream = nullptr;
    status = CudaStatus(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
                        "cudaStreamCreateWithPriority");
    if (status.ok()) mover->streams_.push_back(stream);
  }
  if (!status.ok()) return status;
  mover->releases_.resize(static_cast<size_t>(mover->wiring_.layout.num_sets) * kLegs);
  status = mover->ConnectFar();
  if (!status.ok()) return status;
  mover->thread_ = std::thread([self = mover.get()] { self->Run(); });
  return mover;
}

Status Mover::ConnectFar() {
  if (!wiring_.far || wiring_.layout.announced_bytes == 0) return {};
  const Nodes nodes = NodesOf(wiring_.config);
  std::vector<int32_t> far_ranks;
  for (int32_t member = 0; member < nodes.Members(kWire); ++member) {
    const int32_t rank = nodes.Peer(kWire, wiring_.rank, member);
    if (wiring_.memories[static_cast<size_t>(rank)] == nullptr) far_ranks.push_back(rank);
  }
  auto made = FarAnnouncements::Make(
      {wiring_.rank, std::move(far_ranks), wiring_.layout,
       wiring_.memories[static_cast<size_t>(wiring_.rank)], wiring_.announced, wiring_.far.get()});
  if (!made.ok()) return made.status();
  far_announcements_ = std::move(made.value());
  return {};
}

Mover::~Mover() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
  const ContextScope scope(driver_, context_);
  ForgetTimed();
  if (trace_origin_ != nullptr) (void)cudaEventDestroy(trace_origin_);
  for (const cudaStream_t stream : streams_) {
    (void)cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
  far_announcements_.reset();  // whose events are of this context
}

void Mover::Run() {
  const ContextScope scope(driver_, context_);
  // XLA may be capturing a graph on another thread: nothing that is done here takes part in it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  (void)prctl(PR_SET_TIMERSLACK, 1000UL);  // naps are accurate to a microsecond
  (void)prctl(PR_SET_NAME, "smfree-mover");

  uint64_t next = 0;
  bool told = false;
  Clock::time_point last_work = Clock::now();
  for (uint32_t turn = 0;; ++turn) {
    const Descriptor& chunk = wiring_.queue[next & wiring_.queue_mask];
    bool worked = false, waits = false;
    if (load_acquire_system(&chunk.ticket) == next + 1) {
      if (wiring_.layout.UsesAreas(chunk.tokens)) {
        Hold(chunk);
      } else if (Status status = Move(chunk); !status.ok()) {
        return wiring_.on_error(std::move(status));
      }
      ++next;
      worked = true;
    }
    for (Release& release : releases_) {
      if (!release.waits()) continue;
      auto moved = MoveReleased(release);
      if (!moved.ok()) return wiring_.on_error(moved.status());
      worked = worked || moved.value();
      waits = waits || !moved.value();
    }
    if (worked || waits) last_work = Clock::now();
    if (worked || turn % 64 != 0) continue;
    const bool stop = stop_.load();  // before what is looked at for the last time then
    told = told || ToldFault();
    if (stop) return;
    if (awake_.exchange(false, std::memory_order_relaxed)) last_work = Clock::now();
    const auto nap = NapAfter(Clock::now() - last_work);
    if (nap.count() > 0) std::this_thread::sleep_for(nap);
  }
}

Status Mover::Move(const Descriptor& chunk) {
  const int32_t peer = PeerOf(chunk);
  const auto [from, to, signal] = EndsOf(chunk);
  // The message is contiguous, and chunk 0 begins with its header.
  const int64_t stride = chunk.stride;
  const MessageLayout message(chunk.rows, chunk.experts, chunk.slots, stride);
  const Chunks chunks(chunk.rows, chunk.chunks);
  const int64_t rows_begin = wiring_.layout.header_bytes + message.rows_offset;
  const int64_t begin =
      chunk.chunk == 0 ? 0 : rows_begin + chunks.Begin(chunk.chunk) * stride;
  const int64_t bytes = rows_begin + chunks.End(chunk.chunk) * stride - begin;
  if (wiring_.memories[static_cast<size_t>(peer)] != nullptr) {
    return Copy(chunk, peer, {{from + begin, to + begin, bytes}}, signal);
  }
  wiring_.far->Put(peer, {begin == 0, from + begin, to + begin, bytes, signal, chunk.signal});
  if (AllArrived(chunk.signal, NumberOf(chunk.signal))) wiring_.on_put();
  return {};
}

Mover::Ends Mover::EndsOf(const Descriptor& chunk) const {
  const Layout& layout = wiring_.layout;
  const int64_t number = NumberOf(chunk.signal);
  const int32_t there =
      NodesOf(wiring_.config).RegionAtPeer(chunk.leg, wiring_.rank, chunk.region);
  return {layout.SendRegionOffset(chunk.leg, chunk.set, number, chunk.region),
          layout.RecvRegionOffset(chunk.leg, chunk.set, number, there),
          layout.SignalOffset(chunk.leg, chunk.set, number, there)};
}

void Mover::Hold(const Descriptor& chunk) {
  releases_[static_cast<size_t>(chunk.set) * kLegs + static_cast<size_t>(chunk.leg)].Add(chunk);
  if (!far_announcements_ || chunk.leg != kWire) return;
  if (wiring_.config.puts_on_device) return;  // the kernel that puts has told them
  far_announcements_->Tell(chunk.set, NumberOf(chunk.signal));
}

StatusOr<bool> Mover::MoveReleased(Release& release) {
  const Layout& layout = wiring_.layout;
  const std::vector<Descriptor> chunks =
      release.Take(wiring_.config, layout, wiring_.rank, wiring_.announced);
  if (chunks.empty() && far_announcements_ && release.first().leg == kWire) {
    const Descriptor& first = release.first();
    const Status status = far_announcements_->Look(first.set, NumberOf(first.signal),
                                                   streams_[static_cast<size_t>(wiring_.rank)]);
    if (!status.ok()) return status;
  }
  const Release::Plan& plan = release.plan();
  for (const Descriptor& chunk : chunks) {
    const auto region = static_cast<size_t>(chunk.region);
    const int32_t peer = PeerOf(chunk);
    const Ends ends = EndsOf(chunk);
    // Where ranks run different operations, their headers tell, and no row moves.
    std::vector<Transfer> transfers;
    if (plan.agreed) {
      transfers = TransfersOf(chunk, plan.payload_at[region], plan.kept[region]);
    }
    if (wiring_.memories[static_cast<size_t>(peer)] == nullptr) {
      PutReleased(chunk, ends, transfers);
      continue;
    }
    if (chunk.chunk == 0) {
      transfers.insert(transfers.begin(), {ends.from, ends.to, layout.header_bytes});
    }
    const Status status = Copy(chunk, peer, transfers, ends.signal);
    if (!status.ok()) return status;
  }
  return !chunks.empty();
}

// A put raises the signal when its own bytes are there. So the last one raises that of the chunk,
// behind all others, and these raise what was there before.
void Mover::PutReleased(const Descriptor& chunk, const Ends& ends,
                        const std::vector<Transfer>& payload) {
  std::vector<Transfer> transfers = payload;
  if (chunk.chunk == 0 || payload.empty()) {  // something has to move, to raise the signal
    transfers.insert(transfers.begin(), {ends.from, ends.to, wiring_.layout.header_bytes});
  }
  const int64_t number = NumberOf(chunk.signal);
  for (size_t i = 0; i < transfers.size(); ++i) {
    const bool last = i + 1 == transfers.size();
    const bool first_of_message = chunk.chunk == 0 && i == 0;
    wiring_.far->Put(PeerOf(chunk),
                     {first_of_message, transfers[i].from, transfers[i].to, transfers[i].bytes,
                      ends.signal, last ? chunk.signal : SignalValue(number, chunk.chunk)});
  }
  if (AllArrived(chunk.signal, number)) wiring_.on_put();
}

Status Mover::Copy(const Descriptor& chunk, int32_t peer, const std::vector<Transfer>& transfers,
                   int64_t signal) {
  char* const here = wiring_.memories[static_cast<size_t>(wiring_.rank)];
  char* const there = wiring_.memories[static_cast<size_t>(peer)];
  const cudaStream_t stream = streams_[static_cast<size_t>(peer)];
  int64_t bytes = 0;
  for (const Transfer& transfer : transfers) bytes += transfer.bytes;
  std::unique_lock<std::mutex> tracing(trace_mutex_, std::defer_lock);
  if (tracing_.load(std::memory_order_relaxed)) tracing.lock();
  const Timed* const timed = tracing.owns_lock() ? NextTimed(chunk, bytes) : nullptr;
  const auto address = [](const char* p) { return reinterpret_cast<CUdeviceptr>(p); };
  if (timed) (void)cudaEventRecord(timed->begin, stream);
  for (const Transfer& transfer : transfers) {
    const Status status = driver_.ToStatus(
        driver_.memcpy_dtod_async(address(there + transfer.to), address(here + transfer.from),
                                  static_cast<size_t>(transfer.bytes), stream),
        "the copy to a peer");
    if (!status.ok()) return status;
  }
  if (timed) (void)cudaEventRecord(timed->end, stream);
  // The default flag orders the store behind the copies, system wide.
  return driver_.ToStatus(driver_.stream_write_value64(stream, address(there + signal),
                                                       chunk.signal, CU_STREAM_WRITE_VALUE_DEFAULT),
                          "the signal to a peer");
}

bool Mover::ToldFault() const {
  if (!wiring_.far) return true;
  if (__atomic_load_n(&wiring_.fault->ready, __ATOMIC_ACQUIRE) == 0) return false;
  // As in Report, whose stores reach the near peers: one that has failed has told all.
  if (wiring_.fault->kind != FaultKind::kPeerFailed) wiring_.far->TellFault(wiring_.rank);
  wiring_.on_fault();
  return true;
}

const Mover::Timed* Mover::NextTimed(const Descriptor& chunk, int64_t bytes) {
  if (!tracing_.load() || timed_.size() == kWireRecords) return nullptr;
  Timed timed{chunk, bytes, nullptr, nullptr};
  if (cudaEventCreate(&timed.begin) != cudaSuccess || cudaEventCreate(&timed.end) != cudaSuccess) {
    return nullptr;
  }
  timed_.push_back(timed);
  return &timed_.back();
}

void Mover::ForgetTimed() {
  for (const Timed& timed : timed_) {
    (void)cudaEventDestroy(timed.begin);
    (void)cudaEventDestroy(timed.end);
  }
  timed_.clear();
}

Status Mover::StartTrace() {
  const ContextScope scope(driver_, context_);
  const std::lock_guard<std::mutex> lock(trace_mutex_);
  ForgetTimed();
  auto word = Allocation::OnHost(sizeof(int64_t));
  if (!word.ok()) return word.status();
  if (trace_origin_ == nullptr) {
    const Status status = CudaStatus(cudaEventCreate(&trace_origin_), "cudaEventCreate");
    if (!status.ok()) return status;
  }
  const cudaStream_t stream = streams_[static_cast<size_t>(wiring_.rank)];  // no peer's
  cudaError_t error = LaunchReadClock(word.value().as<int64_t>(), stream);
  if (error == cudaSuccess) error = cudaEventRecord(trace_origin_, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return CudaStatus(error, "reading the device's clock");
  trace_origin_ns_ = *word.value().as<int64_t>();
  tracing_.store(true);
  return {};
}

std::vector<WireRecord> Mover::EndTrace() {
  const ContextScope scope(driver_, context_);
  const std::lock_guard<std::mutex> lock(trace_mutex_);
  tracing_.store(false);
  std::vector<WireRecord> records;
  for (const Timed& timed : timed_) {
    float begin_ms = 0, end_ms = 0;
    if (cudaEventSynchronize(timed.end) != cudaSuccess ||
        cudaEventElapsedTime(&begin_ms, trace_origin_, timed.begin) != cudaSuccess ||
        cudaEventElapsedTime(&end_ms, trace_origin_, timed.end) != cudaSuccess) {
      (void)cudaGetLastError();
      continue;
    }
    const auto at = [&](float ms) {
      return trace_origin_ns_ + static_cast<int64_t>(static_cast<double>(ms) * 1e6);
    };
    const Descriptor& chunk = timed.chunk;
    records.push_back({/*replica=*/0, wiring_.rank, PeerOf(chunk), chunk.lane,
                       SideOf(chunk.derivation), OperationOfNumber(NumberOf(chunk.signal)),
                       at(begin_ms), at(end_ms), timed.bytes});
  }
  ForgetTimed();
  return records;
}

}  // namespace smfree::cuda
