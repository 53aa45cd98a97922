// SPDX-License-Identifier: Apache-2.0
#include "ffi/attributes.h"

namespace smfree {

Status CheckRows(const GroupConfig& config, const ffi::AnyBuffer& rows) {
  const ffi::DataType expected = config.dtype == DType::kF32    ? ffi::F32
                                 : config.dtype == DType::kBF16 ? ffi::BF16
                                                                : ffi::F16;
  const auto shape = rows.dimensions();
  if (shape.size() == 2 && shape[1] == config.hidden && rows.element_type() == expected) return {};
  return Status(FaultKind::kInvalidArgument,
                "a row operand does not have the group's hidden size and dtype; the program was "
                "compiled for another EpConfig. Compile it again.");
}

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
