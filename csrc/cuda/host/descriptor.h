// SPDX-License-Identifier: Apache-2.0
//
// What the pack kernels tell the mover.
#ifndef SMFREE_CSRC_CUDA_HOST_DESCRIPTOR_H_
#define SMFREE_CSRC_CUDA_HOST_DESCRIPTOR_H_

#include <cstdint>

#include "csrc/protocol/identity.h"
#include "csrc/protocol/nodes.h"

namespace smfree::cuda {

// A chunk of a message handed to the mover. Pinned host memory. `ticket`, which is written last, is
// 1 + the number of descriptors before it.
struct alignas(64) Descriptor {
  uint64_t ticket;
  uint64_t signal;   // what `arrived` at the peer becomes after the copy; has the number in it
  int64_t payload;   // where the message's payload begins in this rank's memory
  int32_t set;
  Leg leg;
  int32_t region;  // of the message (nodes.h)
  int32_t rows;    // of the message
  int32_t tokens;
  int32_t stride;  // of its rows, in bytes
  Operation operation;
  int32_t derivation;
  int16_t chunk, chunks;  // of so many that were asked for
  int8_t experts, slots;  // per row
  int16_t lane;
};
static_assert(sizeof(Descriptor) == 64);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_DESCRIPTOR_H_
