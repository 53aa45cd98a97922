// SPDX-License-Identifier: Apache-2.0
//
// Status: success, or the kind of a fault and a text that says got, expected, where and cure.
#ifndef SMFREE_CSRC_PROTOCOL_STATUS_H_
#define SMFREE_CSRC_PROTOCOL_STATUS_H_

#include <optional>
#include <string>
#include <utility>

#include "csrc/protocol/faults.h"

namespace smfree {

class [[nodiscard]] Status {
 public:
  Status() = default;  // success
  Status(FaultKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}

  bool ok() const { return kind_ == FaultKind::kNone; }
  FaultKind kind() const { return kind_; }
  const std::string& message() const { return message_; }

 private:
  FaultKind kind_ = FaultKind::kNone;
  std::string message_;
};

// A value, or the reason why there is none. value() may be called only if ok().
template <typename T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}          // NOLINT: implicit on purpose
  StatusOr(Status status) : status_(std::move(status)) {}  // NOLINT: implicit on purpose

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  T& value() { return *value_; }
  const T& value() const { return *value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_STATUS_H_
