// SPDX-License-Identifier: Apache-2.0
#include "ffi/attributes.h"

namespace smfree {

Status NoSuchGroup() {
  return Status(FaultKind::kClosed,
                "the EpGroup of this program is closed, or was never created in this process. "
                "Create it with the same mesh, axis and config, and keep it open while programs "
                "that use it run.");
}

ffi::Error ToError(const Status& status) {
  const auto code = [&] {
    switch (status.kind()) {
      case FaultKind::kInvalidArgument:
      case FaultKind::kInvalidRouting: return ffi::ErrorCode::kInvalidArgument;
      case FaultKind::kDeadline: return ffi::ErrorCode::kDeadlineExceeded;
      case FaultKind::kOutOfMemory: return ffi::ErrorCode::kResourceExhausted;
      case FaultKind::kTwoInFlight:
      case FaultKind::kClosed: return ffi::ErrorCode::kFailedPrecondition;
      default: return ffi::ErrorCode::kAborted;
    }
  }();
  return status.ok() ? ffi::Error::Success() : ffi::Error(code, "jax_smfree: " + status.message());
}

}  // namespace smfree
