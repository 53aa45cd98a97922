// SPDX-License-Identifier: Apache-2.0
//
// Which GPUs of the host this process sees. Copies to one that CUDA_VISIBLE_DEVICES hides start late
// (docs/decisions.md).
#ifndef SMFREE_CSRC_CUDA_DRIVER_VISIBLE_H_
#define SMFREE_CSRC_CUDA_DRIVER_VISIBLE_H_

#include <cstdint>
#include <string>

#include "csrc/core/status.h"

namespace smfree::cuda {

// What all processes of a host call this GPU.
StatusOr<std::string> BusId(int32_t device);
bool IsVisible(const std::string& bus_id);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_DRIVER_VISIBLE_H_
