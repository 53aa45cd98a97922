// SPDX-License-Identifier: Apache-2.0
//
// The CPU handlers.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include "csrc/cpu/backend.h"
#include "csrc/protocol/token.h"
#include "ffi/combine_recv.h"
#include "ffi/combine_send.h"
#include "ffi/dispatch_recv.h"
#include "ffi/dispatch_send.h"
#include "ffi/module.h"

namespace smfree {
namespace {

// One object per custom call in a compiled program, shared by the devices of the process. It tells
// two calls apart that are alike in everything else (a jitted layer that is called twice).
struct SendInstance {
  static inline ffi::TypeId id = {};
  static const ffi::TypeInfo info;
  int64_t number;
};
const ffi::TypeInfo SendInstance::info = ffi::MakeTypeInfo<SendInstance>();

ffi::ErrorOr<std::unique_ptr<SendInstance>> NewSendInstance() {
  static std::atomic<int64_t> count{0};
  // The token carries it as a float32.
  return std::make_unique<SendInstance>(SendInstance{++count % (int64_t{1} << 24)});
}

// An operation of an open group: `token` is the one that came in.
struct Begun {
  std::shared_ptr<cpu::Group> group;
  cpu::Call call;
  Token token;
};

template <typename Arrays>
StatusOr<Begun> Begin(const TokenArg& token, const PositionArg& position,
                      const Attributes& attributes, const Operands<Arrays>& operands) {
  const int32_t rank = position.typed_data()[0];
  const int32_t replica = position.typed_data()[1];
  Begun begun;
  begun.group = cpu::FindGroup(attributes.group, replica);
  if (begun.group == nullptr) return NoSuchGroup();
  begun.token = Token::Read(token.typed_data());
  if (!begun.token.used_once()) return Status(FaultKind::kTwoInFlight, kTokenUsedTwice);
  Status status = CheckRows(begun.group->config(), operands.rows);
  if (!status.ok()) return status;
  begun.call.rank = rank;
  begun.call.tokens = operands.tokens;
  begun.call.identity.lane = static_cast<int32_t>(attributes.lane);
  begun.call.identity.derivation = static_cast<int32_t>(attributes.derivation);
  begun.call.identity.call_site = static_cast<uint32_t>(attributes.call_site);
  begun.call.identity.number = begun.token.number;
  return begun;
}

// The handler, by stage, that runs the send `phase` on the arrays of `operands_of`.
template <auto phase, auto operands_of>
nb::dict Sending() {
  constexpr auto send = [](SendInstance* instance, ffi::RunId run_id, TokenArg token,
                           PositionArg position, TokenRet token_out, Attributes attributes,
                           auto... buffers) {
    const auto operands = operands_of(buffers...);
    auto begun = Begin(token, position, attributes, operands);
    if (!begun.ok()) return ToError(begun.status());
    auto& [group, call, _] = begun.value();
    call.identity.run_id = run_id.run_id % Token::kLimit;
    call.identity.instance = instance->number;
    const Status status = phase(*group, call, operands.arrays);
    if (status.ok()) {  // the token is in flight
      Token{1.0f, call.identity.number, call.identity.run_id, call.identity.instance}.Write(
          token_out->typed_data());
    }
    return ToError(status);
  };
  XLA_FFI_DEFINE_HANDLER(new_instance, NewSendInstance, ffi::Ffi::BindInstantiate());
  XLA_FFI_DEFINE_HANDLER(handler, send,
                         BindOperands(ffi::Ffi::Bind()
                                          .Ctx<ffi::State<SendInstance>>()
                                          .Ctx<ffi::RunId>()
                                          .Arg<TokenArg>()
                                          .Arg<PositionArg>()
                                          .Ret<TokenArg>()
                                          .Attrs<Attributes>(),
                                      operands_of));
  nb::dict stages;
  stages["instantiate"] = Handler(new_instance);
  stages["execute"] = Handler(handler);
  return stages;
}

// Runs a receive: `start` gets the callback that completes the future.
ffi::Future Receive(const std::function<void(cpu::Done)>& start) {
  ffi::Promise promise;
  ffi::Future future(promise);
  start([promise](Status status) mutable {
    if (status.ok()) {
      promise.SetAvailable();
    } else {
      promise.SetError(ToError(status));
    }
  });
  return future;
}

// A receive that has ended already.
ffi::Future Done(const Status& status) {
  return Receive([&](cpu::Done done) { done(status); });
}

template <typename Buffer>
void SetZero(const Buffer&) {}  // not a result
template <typename Buffer>
void SetZero(Out<Buffer>& out) {
  std::memset(out->untyped_data(), 0, out->size_bytes());
}

// The handler that runs the recv `phase` on the arrays of `operands_of`.
template <auto phase, auto operands_of>
nb::capsule Receiving() {
  constexpr auto receive = [](TokenArg token, PositionArg position, TokenRet token_out,
                              Attributes attributes, auto... buffers) {
    const auto operands = operands_of(buffers...);
    auto begun = Begin(token, position, attributes, operands);
    if (!begun.ok()) return Done(begun.status());
    auto& [group, call, incoming] = begun.value();
    call.identity.run_id = incoming.run_id;
    call.identity.instance = incoming.instance;
    Token{1.0f, (incoming.number + 1) % Token::kLimit, 0, 0}.Write(token_out->typed_data());
    // A cotangent for which nothing was sent is zero; only cotangents take a known routing.
    constexpr bool kMayBeZero = !std::is_same_v<decltype(operands.arrays), DispatchRecvArrays>;
    if (kMayBeZero && incoming.zero()) {
      (SetZero(buffers), ...);
      return Done({});
    }
    return Receive(
        [&](cpu::Done done) { phase(*group, call, operands.arrays, std::move(done)); });
  };
  XLA_FFI_DEFINE_HANDLER(handler, receive,
                         BindOperands(ffi::Ffi::Bind()
                                          .Arg<TokenArg>()
                                          .Arg<PositionArg>()
                                          .Ret<TokenArg>()
                                          .Attrs<Attributes>(),
                                      operands_of));
  return Handler(handler);
}

}  // namespace

nb::dict CpuTargets() {
  nb::dict targets;
  targets["smfree_dispatch_send"] = Sending<cpu::DispatchSend, DispatchSendOperands>();
  targets["smfree_dispatch_send_cached"] =
      Sending<cpu::DispatchSendCached, DispatchSendCachedOperands>();
  targets["smfree_combine_send"] = Sending<cpu::CombineSend, CombineSendOperands>();
  targets["smfree_combine_send_weighted"] =
      Sending<cpu::CombineSend, CombineSendWeightedOperands>();
  targets["smfree_dispatch_recv"] = Receiving<cpu::DispatchRecv, DispatchRecvOperands>();
  targets["smfree_dispatch_recv_cached"] =
      Receiving<cpu::DispatchRecvCached, DispatchRecvCachedOperands>();
  targets["smfree_dispatch_recv_weighted"] =
      Receiving<cpu::DispatchRecvCached, DispatchRecvWeightedOperands>();
  targets["smfree_combine_recv"] = Receiving<cpu::CombineRecv, CombineRecvOperands>();
  return targets;
}

nb::dict CpuTypes() {
  nb::dict types;
  types["SmfreeSendInstance"] =
      nb::make_tuple(nb::capsule(&SendInstance::id), nb::capsule(&SendInstance::info));
  return types;
}

}  // namespace smfree
