// SPDX-License-Identifier: Apache-2.0
//
// The CPU handlers.
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/compiled_calls.h"
#include "csrc/core/describe.h"
#include "csrc/protocol/token.h"
#include "ffi/combine_recv.h"
#include "ffi/combine_send.h"
#include "ffi/dispatch_recv.h"
#include "ffi/dispatch_send.h"
#include "ffi/module.h"

namespace smfree {
namespace {

// The state of a custom call that makes an operation or a token.
struct CallState {
  static inline ffi::TypeId id = {};
  static const ffi::TypeInfo info;
  cpu::CompiledCall call;
};
const ffi::TypeInfo CallState::info = ffi::MakeTypeInfo<CallState>();

// The stage of a handler at which XLA creates the call.
template <cpu::CallAttributes::Makes makes>
ffi::ErrorOr<std::unique_ptr<CallState>> NewCall(Attributes attributes) {
  return std::unique_ptr<CallState>(new CallState{cpu::CompiledCall(
      {attributes.group, static_cast<int32_t>(attributes.lane),
       static_cast<int32_t>(attributes.derivation), static_cast<uint32_t>(attributes.call_site),
       makes})});
}

int64_t Number(ffi::RunId run_id) { return run_id.run_id % Token::kLimit; }

// A token that begins a sequence, which is named by this call of the program.
nb::dict BeginningTokens() {
  constexpr auto begin = [](CallState* state, ffi::RunId run_id, TokenArg, TokenRet token_out,
                            Attributes) {
    Token token;
    token.magic = 1;
    token.sequence = state->call.Sequence(Number(run_id));
    token.Write(token_out->typed_data());
    return ffi::Error::Success();
  };
  constexpr auto new_call = NewCall<cpu::CallAttributes::Makes::kToken>;
  XLA_FFI_DEFINE_HANDLER(instantiate, new_call, ffi::Ffi::BindInstantiate().Attrs<Attributes>());
  XLA_FFI_DEFINE_HANDLER(execute, begin,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::State<CallState>>()
                             .Ctx<ffi::RunId>()
                             .Arg<TokenArg>()
                             .Ret<TokenArg>()
                             .Attrs<Attributes>());
  nb::dict stages;
  stages["instantiate"] = Handler(instantiate);
  stages["execute"] = Handler(execute);
  return stages;
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
  begun.call.rank = rank;
  begun.call.tokens = attributes.tokens;
  begun.call.identity.lane = static_cast<int32_t>(attributes.lane);
  begun.call.identity.derivation = static_cast<int32_t>(attributes.derivation);
  begun.call.identity.call_site = static_cast<uint32_t>(attributes.call_site);
  begun.call.identity.number = begun.token.number;
  begun.call.identity.sequence = begun.token.sequence;
  if (!begun.token.used_once()) {
    return Status(FaultKind::kTwoInFlight,
                  DescribePoint(begun.call.identity) + ": " + kTokenUsedTwice);
  }
  const Status status = CheckShapes(begun.group->config(), attributes, operands);
  if (!status.ok()) return status;
  return begun;
}

// The handler, by stage, that runs the send `phase` on the arrays of `operands_of`.
template <cpu::CallAttributes::Makes makes, auto phase, auto operands_of>
nb::dict Sending() {
  constexpr auto send = [](CallState* state, ffi::RunId run_id, TokenArg token,
                           PositionArg position, TokenRet token_out, Attributes attributes,
                           auto... buffers) {
    const auto operands = operands_of(attributes, buffers...);
    auto begun = Begin(token, position, attributes, operands);
    if (!begun.ok()) return ToError(begun.status());
    auto& [group, call, incoming] = begun.value();
    Identity& identity = call.identity;
    identity.run_id = Number(run_id);
    identity.instance = state->call.instance();
    if (identity.sequence == 0) identity.sequence = state->call.Sequence(identity.run_id);
    const Status status = phase(*group, call, operands.arrays);
    if (status.ok()) {  // the token is in flight
      Token{1.0f, identity.number, identity.run_id, identity.instance, identity.sequence}.Write(
          token_out->typed_data());
    }
    return ToError(status);
  };
  constexpr auto new_call = NewCall<makes>;
  XLA_FFI_DEFINE_HANDLER(instantiate, new_call, ffi::Ffi::BindInstantiate().Attrs<Attributes>());
  XLA_FFI_DEFINE_HANDLER(handler, send,
                         BindOperands(ffi::Ffi::Bind()
                                          .Ctx<ffi::State<CallState>>()
                                          .Ctx<ffi::RunId>()
                                          .Arg<TokenArg>()
                                          .Arg<PositionArg>()
                                          .Ret<TokenArg>()
                                          .Attrs<Attributes>(),
                                      operands_of));
  nb::dict stages;
  stages["instantiate"] = Handler(instantiate);
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
void SetZero(const LeavesOut& leaves) {
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    auto out = leaves.get<ffi::AnyBuffer>(leaf);
    if (out.has_value()) SetZero(out.value());
  }
}

// Adds to results that are zero what a combine_recv is to add.
template <typename Arrays>
void AddTo(const Arrays&, int64_t) {}
void AddTo(const CombineRecvArrays& arrays, int64_t tokens) {
  const RowFormat& format = arrays.add.format;
  for (int32_t leaf = 0; leaf < format.count; ++leaf) {
    std::memcpy(arrays.out.leaves[leaf], arrays.add.leaves[leaf],
                static_cast<size_t>(tokens * format.leaves[leaf].bytes()));
  }
}

// The handler that runs the recv `phase` on the arrays of `operands_of`.
template <auto phase, auto operands_of>
nb::capsule Receiving() {
  constexpr auto receive = [](TokenArg token, PositionArg position, TokenRet token_out,
                              Attributes attributes, auto... buffers) {
    const auto operands = operands_of(attributes, buffers...);
    auto begun = Begin(token, position, attributes, operands);
    if (!begun.ok()) return Done(begun.status());
    auto& [group, call, incoming] = begun.value();
    call.identity.run_id = incoming.run_id;
    call.identity.instance = incoming.instance;
    Token{1.0f, (incoming.number + 1) % Token::kLimit, 0, {}, incoming.sequence}.Write(
        token_out->typed_data());
    // A cotangent for which nothing was sent is zero; only cotangents take a known routing.
    constexpr bool kMayBeZero = !std::is_same_v<decltype(operands.arrays), DispatchRecvArrays>;
    if (kMayBeZero && incoming.zero()) {
      (SetZero(buffers), ...);
      AddTo(operands.arrays, attributes.tokens);
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
  using Makes = cpu::CallAttributes::Makes;
  nb::dict targets;
  targets["smfree_token"] = BeginningTokens();
  targets["smfree_dispatch_send"] =
      Sending<Makes::kDispatch, cpu::DispatchSend, DispatchSendOperands>();
  targets["smfree_dispatch_send_cached"] =
      Sending<Makes::kDispatch, cpu::DispatchSendCached, DispatchSendCachedOperands>();
  targets["smfree_combine_send"] =
      Sending<Makes::kCombine, cpu::CombineSend, CombineSendOperands>();
  targets["smfree_combine_send_weighted"] =
      Sending<Makes::kCombine, cpu::CombineSend, CombineSendWeightedOperands>();
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
  types["SmfreeCall"] = nb::make_tuple(nb::capsule(&CallState::id), nb::capsule(&CallState::info));
  return types;
}

}  // namespace smfree
