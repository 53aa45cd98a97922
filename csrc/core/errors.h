// SPDX-License-Identifier: Apache-2.0
//
// The errors that both backends know, in one wording: who met what, what was expected, the cure.
// `call` is what DescribeCall says of the phase that met it.
#ifndef SMFREE_CSRC_CORE_ERRORS_H_
#define SMFREE_CSRC_CORE_ERRORS_H_

#include <cstdint>
#include <string>

#include "csrc/core/status.h"
#include "csrc/protocol/group_config.h"

namespace smfree {

// What is wrong with the sizes of a group of `ranks` ranks; both backends can have it.
Status CheckConfig(const GroupConfig& config, int64_t ranks);
// What is wrong with the rows or the lane of a call.
Status CheckSizes(const GroupConfig& config, const std::string& call, int64_t tokens,
                  int32_t lane);

// The kind, and then the text.
Status Fault(FaultKind kind, const std::string& text);
Status InvalidArgument(const std::string& call, const std::string& what);
// Of a handle, for InvalidArgument.
std::string BrokenHandle(const std::string& what);
std::string BrokenPlace(int64_t row, int64_t place);
std::string BrokenCount(int64_t seen, int32_t rank, int64_t most);
// `seen` names the experts of the row, as far as they are known.
Status InvalidRouting(const std::string& call, int64_t row, int64_t expert, int32_t num_experts,
                      const std::string& seen);
// `other` is in flight. `else_where` says how to begin both at once.
Status TwoInFlight(const std::string& call, const std::string& other,
                   const std::string& else_where);
Status ScheduleMismatch(const std::string& call, const std::string& expected,
                        const std::string& got, int32_t source);
// `whom` says for which rank, and what came from it.
Status DeadlineExceeded(const std::string& call, double waited_s, const std::string& whom);
Status Overflowed(const std::string& call, int64_t dropped, int64_t capacity);
Status GroupClosed(const std::string& call);
Status FailedBefore(const std::string& call, const Status& fault);

}  // namespace smfree

#endif  // SMFREE_CSRC_CORE_ERRORS_H_
