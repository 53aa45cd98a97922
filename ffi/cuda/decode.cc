// SPDX-License-Identifier: Apache-2.0
#include "ffi/cuda/decode.h"

namespace smfree {

StatusOr<CudaCall> BeginCall(int32_t device, const TokenArg& token, const PositionArg& position,
                             const Attributes& attributes, int64_t tokens,
                             const ffi::AnyBuffer& rows, TokenRet& token_out) {
  CudaCall begun;
  begun.rank = cuda::FindRank(attributes.group, device);
  if (begun.rank == nullptr) return NoSuchGroup();
  if (Status status = CheckRows(cuda::ConfigOf(*begun.rank), rows); !status.ok()) return status;
  begun.call.lane = static_cast<int32_t>(attributes.lane);
  begun.call.derivation = static_cast<int32_t>(attributes.derivation);
  begun.call.call_site = static_cast<uint32_t>(attributes.call_site);
  begun.call.tokens = tokens;
  begun.call.token = token.typed_data();
  begun.call.position = position.typed_data();
  begun.call.token_out = token_out->typed_data();
  return begun;
}

}  // namespace smfree
