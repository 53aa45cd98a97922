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
// What is wrong with a handle, as text for InvalidArgument.
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
// Copies of rows that did not fit into the `capacity` rows of the expert-grouped array that were to
// be filled: recv_capacity, or fewer as the call has it.
Status Overflowed(const std::string& call, int64_t dropped, int64_t capacity,
                  const GroupConfig& config);
// The same where groups are padded, and have room for `capacity` each: `expert` got the most copies.
Status OverflowedGroup(const std::string& call, int64_t dropped, int32_t expert, int64_t copies,
                       int64_t capacity, const GroupConfig& config);
// All `rows` that came for a rank, of which not all fit on the wire.
Status OverflowedWire(const std::string& call, int64_t rows, const GroupConfig& config);
// Rows for a rank of which a relay of its node has not handed on all.
Status OverflowedRelay(const std::string& call, const GroupConfig& config);
Status GroupClosed(const std::string& call);
Status FailedBefore(const std::string& call, const Status& fault);

}  // namespace smfree

#endif  // SMFREE_CSRC_CORE_ERRORS_H_
