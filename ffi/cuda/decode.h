// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA handlers share: from the attributes and the device that a handler runs on to a call
// of the backend. Tokens and positions are device memory: the kernels read them.
#ifndef SMFREE_FFI_CUDA_DECODE_H_
#define SMFREE_FFI_CUDA_DECODE_H_

#include <cstdint>
#include <memory>

#include "csrc/cuda/backend.h"
#include "ffi/attributes.h"

namespace smfree {

// Every handler only launches kernels, the same ones each time: XLA may capture them into a CUDA
// graph and replay it.
constexpr std::initializer_list<ffi::Traits> kCapturable = {ffi::Traits::kCmdBufferCompatible};

struct CudaCall {
  std::shared_ptr<cuda::Rank> rank;
  cuda::Call call;
};

// `rows` is checked to be rows of the group.
StatusOr<CudaCall> BeginCall(int32_t device, const TokenArg& token, const PositionArg& position,
                             const Attributes& attributes, int64_t tokens,
                             const ffi::AnyBuffer& rows, TokenRet& token_out);

}  // namespace smfree

#endif  // SMFREE_FFI_CUDA_DECODE_H_
