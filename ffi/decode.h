// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of all phases share: the attributes, the state of a send, and the way from a
// token, a position and the attributes to a call of the backend.
#ifndef SMFREE_FFI_DECODE_H_
#define SMFREE_FFI_DECODE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "csrc/cpu/backend.h"
#include "ffi/token.h"
#include "xla/ffi/api/ffi.h"

namespace smfree {

namespace ffi = xla::ffi;

struct Attributes {
  int64_t group;
  int64_t lane;
  int64_t derivation;
  int64_t call_site;
};

// One object per custom call in a compiled program, shared by the devices of the process. It tells
// two calls apart that are alike in everything else (a jitted layer that is called twice).
struct SendInstance {
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  int64_t number;
};
ffi::ErrorOr<std::unique_ptr<SendInstance>> NewSendInstance();

using TokenArg = ffi::Buffer<ffi::F32, 1>;
using TokenRet = ffi::Result<TokenArg>;
using PositionArg = ffi::Buffer<ffi::S32, 1>;  // {rank, replica}
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// A decoded operation: `token` is the one that came in.
struct Decoded {
  std::shared_ptr<cpu::Group> group;
  cpu::Call call;
  Token token;
};

StatusOr<Decoded> BeginSend(const TokenArg& token, const PositionArg& position,
                              const Attributes& attributes, const SendInstance& instance,
                              ffi::RunId run_id, int64_t tokens);
StatusOr<Decoded> BeginRecv(const TokenArg& token, const PositionArg& position,
                              const Attributes& attributes, int64_t tokens);

// The token in flight that a send returns, and the ready one that a recv returns.
void WriteInFlight(const Decoded& operation, TokenRet& token);
void WriteReady(const Decoded& operation, TokenRet& token);

// The rows are [*, hidden] in the group's dtype.
Status CheckRows(const cpu::GroupConfig& config, const ffi::AnyBuffer& rows);

ffi::Error ToError(const Status& status);

// Runs a receive: `start` gets the callback that completes the future.
ffi::Future Receive(const std::function<void(cpu::Done)>& start);
// A receive that has ended already.
ffi::Future Done(const Status& status);

inline const float* OrNull(const Floats& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}
inline float* OrNull(ffi::Result<Floats>& buffer) {
  return buffer->element_count() ? buffer->typed_data() : nullptr;
}

}  // namespace smfree

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(smfree::Attributes,
                                      xla::ffi::StructMember<int64_t>("group"),
                                      xla::ffi::StructMember<int64_t>("lane"),
                                      xla::ffi::StructMember<int64_t>("derivation"),
                                      xla::ffi::StructMember<int64_t>("call_site"));

#endif  // SMFREE_FFI_DECODE_H_
