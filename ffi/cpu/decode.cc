// SPDX-License-Identifier: Apache-2.0
#include "ffi/cpu/decode.h"

#include <atomic>
#include <utility>

namespace smfree {

ffi::TypeId SendInstance::id = {};
ffi::TypeInfo SendInstance::info = ffi::MakeTypeInfo<SendInstance>();

ffi::ErrorOr<std::unique_ptr<SendInstance>> NewSendInstance() {
  static std::atomic<int64_t> count{0};
  // The token carries it as a float32.
  return std::make_unique<SendInstance>(SendInstance{++count % (int64_t{1} << 24)});
}

namespace {

StatusOr<Decoded> Begin(const TokenArg& token, const PositionArg& position,
                          const Attributes& attributes, int64_t tokens) {
  const int32_t rank = position.typed_data()[0];
  const int32_t replica = position.typed_data()[1];
  Decoded operation;
  operation.group = cpu::FindGroup(attributes.group, replica);
  if (operation.group == nullptr) {
    return NoSuchGroup();
  }
  operation.token = Token::Read(token.typed_data());
  if (!operation.token.used_once()) return Status(FaultKind::kTwoInFlight, kTokenUsedTwice);
  operation.call.rank = rank;
  operation.call.tokens = tokens;
  operation.call.identity.lane = static_cast<int32_t>(attributes.lane);
  operation.call.identity.derivation = static_cast<int32_t>(attributes.derivation);
  operation.call.identity.call_site = static_cast<uint32_t>(attributes.call_site);
  operation.call.identity.number = operation.token.number;
  return operation;
}

}  // namespace

StatusOr<Decoded> BeginSend(const TokenArg& token, const PositionArg& position,
                              const Attributes& attributes, const SendInstance& instance,
                              ffi::RunId run_id, int64_t tokens) {
  StatusOr<Decoded> operation = Begin(token, position, attributes, tokens);
  if (!operation.ok()) return operation;
  Identity& identity = operation.value().call.identity;
  identity.run_id = run_id.run_id % Token::kLimit;
  identity.instance = instance.number;
  return operation;
}

StatusOr<Decoded> BeginRecv(const TokenArg& token, const PositionArg& position,
                              const Attributes& attributes, int64_t tokens) {
  StatusOr<Decoded> operation = Begin(token, position, attributes, tokens);
  if (!operation.ok()) return operation;
  Identity& identity = operation.value().call.identity;
  identity.run_id = operation.value().token.run_id;
  identity.instance = operation.value().token.instance;
  return operation;
}

void WriteInFlight(const Decoded& operation, TokenRet& token) {
  const Identity& identity = operation.call.identity;
  Token{1.0f, identity.number, identity.run_id, identity.instance}.Write(token->typed_data());
}

void WriteReady(const Decoded& operation, TokenRet& token) {
  Token{1.0f, (operation.token.number + 1) % Token::kLimit, 0, 0}.Write(token->typed_data());
}

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

ffi::Future Done(const Status& status) {
  return Receive([&](cpu::Done done) { done(status); });
}

}  // namespace smfree

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuNewSendInstance, smfree::NewSendInstance,
                              xla::ffi::Ffi::BindInstantiate());
