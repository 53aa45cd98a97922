// SPDX-License-Identifier: Apache-2.0
//
// What the CPU handlers share: the state of a send, and the way from a token, a position and the
// attributes to a call of the backend.
#ifndef SMFREE_FFI_CPU_DECODE_H_
#define SMFREE_FFI_CPU_DECODE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "csrc/cpu/backend.h"
#include "csrc/protocol/token.h"
#include "ffi/attributes.h"

namespace smfree {

// One object per custom call in a compiled program, shared by the devices of the process. It tells
// two calls apart that are alike in everything else (a jitted layer that is called twice).
struct SendInstance {
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  int64_t number;
};
ffi::ErrorOr<std::unique_ptr<SendInstance>> NewSendInstance();

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

// Runs a receive: `start` gets the callback that completes the future.
ffi::Future Receive(const std::function<void(cpu::Done)>& start);
// A receive that has ended already.
ffi::Future Done(const Status& status);

}  // namespace smfree

#endif  // SMFREE_FFI_CPU_DECODE_H_
