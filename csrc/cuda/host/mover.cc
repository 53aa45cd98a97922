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
  mover->thread_ = std::thread([self = mover.get()] { self->Run(); });
  return mover;
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
    if (load_acquire_system(&chunk.ticket) == next + 1) {
      Status status = Move(chunk);
      if (!status.ok()) return wiring_.on_error(std::move(status));
      ++next;
      last_work = Clock::now();
      continue;
    }
    if (turn % 64 != 0) continue;
    const bool stop = stop_.load();  // before what is looked at for the last time then
    told = told || ToldFault();
    if (stop) return;
    if (awake_.exchange(false, std::memory_order_relaxed)) last_work = Clock::now();
    const auto nap = NapAfter(Clock::now() - last_work);
    if (nap.count() > 0) std::this_thread::sleep_for(nap);
  }
}

Status Mover::Move(const Descriptor& chunk) {
  const Layout& layout = wiring_.layout;
  const int64_t number = NumberOf(chunk.signal);
  const int32_t peer = PeerOf(chunk);
  const int32_t there = wiring_.nodes.RegionAtPeer(chunk.leg, wiring_.rank, chunk.region);
  const int64_t from =
      layout.SendRegionOffset(chunk.leg, chunk.lane_index, number, chunk.region) + chunk.begin;
  const int64_t to =
      layout.RecvRegionOffset(chunk.leg, chunk.lane_index, number, there) + chunk.begin;
  const int64_t signal = layout.SignalOffset(chunk.leg, chunk.lane_index, number, there);
  if (wiring_.memories[static_cast<size_t>(peer)] != nullptr) {
    return Copy(chunk, peer, from, to, signal);
  }
  const bool first = chunk.begin == 0;
  wiring_.far->Put(peer, {first, from, to, chunk.bytes, signal, chunk.signal});
  if (AllArrived(chunk.signal, number)) wiring_.on_put(chunk.lane_index);
  return {};
}

Status Mover::Copy(const Descriptor& chunk, int32_t peer, int64_t from, int64_t to,
                   int64_t signal) {
  char* const here = wiring_.memories[static_cast<size_t>(wiring_.rank)];
  char* const there = wiring_.memories[static_cast<size_t>(peer)];
  const cudaStream_t stream = streams_[static_cast<size_t>(peer)];
  std::unique_lock<std::mutex> tracing(trace_mutex_, std::defer_lock);
  if (tracing_.load(std::memory_order_relaxed)) tracing.lock();
  const Timed* const timed = tracing.owns_lock() ? NextTimed(chunk) : nullptr;
  const auto address = [](const char* p) { return reinterpret_cast<CUdeviceptr>(p); };
  if (timed) (void)cudaEventRecord(timed->begin, stream);
  Status status = driver_.ToStatus(
      driver_.memcpy_dtod_async(address(there + to), address(here + from),
                                static_cast<size_t>(chunk.bytes), stream),
      "the copy to a peer");
  if (!status.ok()) return status;
  if (timed) (void)cudaEventRecord(timed->end, stream);
  // The default flag orders the store behind the copy, system wide.
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

const Mover::Timed* Mover::NextTimed(const Descriptor& chunk) {
  if (!tracing_.load() || timed_.size() == kWireRecords) return nullptr;
  Timed timed{chunk, nullptr, nullptr};
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
    const int32_t lanes = wiring_.num_lanes;
    records.push_back(
        {/*replica=*/0, wiring_.rank, PeerOf(timed.chunk), timed.chunk.lane_index % lanes,
         static_cast<Side>(timed.chunk.lane_index / lanes), NumberOf(timed.chunk.signal) - 1,
         at(begin_ms), at(end_ms), timed.chunk.bytes});
  }
  ForgetTimed();
  return records;
}

}  // namespace smfree::cuda
