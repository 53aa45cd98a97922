// SPDX-License-Identifier: Apache-2.0
//
// Compiles the protocol headers as device code, and checks that nvcc lays the shared structs out as
// the C++ compiler does. It is compiled, never run:
//   nvcc -arch=sm_90 -std=c++17 -I. -c tests/cpp/protocol_device.cu -o /dev/null
#include <cstddef>
#include <cstdint>

#include "csrc/protocol/faults.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/layout.h"
#include "csrc/protocol/signals.h"

namespace smfree {

static_assert(sizeof(Identity) == 40 && offsetof(Identity, operation) == 36);
static_assert(sizeof(FaultKind) == 4);
static_assert(sizeof(LaneState) == 16 && offsetof(LaneState, received) == 8);
static_assert(sizeof(Layout) == 72 && offsetof(Layout, peers) == 48);
static_assert(sizeof(MessageLayout) == 32);

constexpr LayoutConfig kConfig{4, 4, 256, 8, 1, 2, 7168, 8192, false, false};
static_assert(Layout::Make(kConfig).row_bytes == 14336);
static_assert(RdmaSizeHint(kConfig) + NvlSizeHint(kConfig) == Layout::Make(kConfig).TotalBytes());
static_assert(MaxRecvRows(4, 8192, 8, 64, 1) == 4 * 8192 * 8);

// One operation of one thread: every function of the protocol that kernels call.
__global__ void OneOperation(Layout layout, LaneState* lane, char* memory, char* peer_memory,
                             int64_t rows, int32_t rank, int32_t peer, FaultKind* fault) {
  int64_t number = kNoOperation;
  *fault = BeginSend(*lane, number);
  if (*fault != FaultKind::kNone) return;

  const int32_t index = LaneIndex(0, Side::kForward, 1);
  const MessageLayout message = layout.Message(rows, true, true);
  char* send = memory + layout.SendRegionOffset(kWire, index, number, peer) + layout.header_bytes;
  send[message.rows_offset] = 1;

  char* signal = peer_memory + layout.SignalOffset(kWire, index, number, rank);
  store_release_system(reinterpret_cast<uint64_t*>(signal), SignalAfterChunk(number, 0, 1));

  if (!MayReceive(*lane, number)) return;
  const char* arrived = memory + layout.SignalOffset(kWire, index, number, peer);
  while (!AllArrived(load_acquire_system(reinterpret_cast<const uint64_t*>(arrived)), number)) {
  }
  const char* recv = memory + layout.RecvRegionOffset(kWire, index, number, peer);
  memory[0] = recv[layout.header_bytes + message.rows_offset];
  FinishRecv(*lane, number);
}

}  // namespace smfree
