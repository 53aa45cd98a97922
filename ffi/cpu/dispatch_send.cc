// SPDX-License-Identifier: Apache-2.0
#include "ffi/cpu/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error DispatchSend(TokenArg token, PositionArg position, ffi::AnyBuffer x, Ints topk_idx,
                        Floats topk_weights, TokenRet token_out, ffi::Result<Ints> places,
                        ffi::Result<Ints> send_counts, SendInstance* instance, ffi::RunId run_id,
                        Attributes attributes) {
  auto operation = BeginSend(token, position, attributes, *instance, run_id, x.dimensions()[0]);
  if (!operation.ok()) return ToError(operation.status());
  auto& [group, call, _] = operation.value();
  if (Status status = CheckRows(group->config(), x); !status.ok()) return ToError(status);

  cpu::DispatchSendArgs args{call};
  args.x = x.untyped_data();
  args.topk_idx = topk_idx.typed_data();
  args.topk_weights = topk_weights.typed_data();
  args.places = places->typed_data();
  args.send_counts = send_counts->typed_data();
  if (Status status = cpu::DispatchSend(*group, args); !status.ok()) return ToError(status);
  WriteInFlight(operation.value(), token_out);
  return ffi::Error::Success();
}

ffi::Error DispatchSendCached(TokenArg token, PositionArg position, ffi::AnyBuffer x, Floats slots,
                              Ints places, Ints send_counts, TokenRet token_out,
                              SendInstance* instance, ffi::RunId run_id, Attributes attributes) {
  auto operation = BeginSend(token, position, attributes, *instance, run_id, x.dimensions()[0]);
  if (!operation.ok()) return ToError(operation.status());
  auto& [group, call, _] = operation.value();
  if (Status status = CheckRows(group->config(), x); !status.ok()) return ToError(status);

  cpu::DispatchSendCachedArgs args{call};
  args.x = x.untyped_data();
  args.slots = OrNull(slots);
  args.places = places.typed_data();
  args.send_counts = send_counts.typed_data();
  if (Status status = cpu::DispatchSendCached(*group, args); !status.ok()) return ToError(status);
  WriteInFlight(operation.value(), token_out);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuDispatchSend, DispatchSend,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<Ints>()             // topk_idx
                                  .Arg<Floats>()           // topk_weights
                                  .Ret<TokenArg>()         // token
                                  .Ret<Ints>()             // places
                                  .Ret<Ints>()             // send_counts
                                  .Ctx<ffi::State<SendInstance>>()
                                  .Ctx<ffi::RunId>()
                                  .Attrs<Attributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuDispatchSendCached, DispatchSendCached,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<Floats>()           // slots
                                  .Arg<Ints>()             // places
                                  .Arg<Ints>()             // send_counts
                                  .Ret<TokenArg>()         // token
                                  .Ctx<ffi::State<SendInstance>>()
                                  .Ctx<ffi::RunId>()
                                  .Attrs<Attributes>());

}  // namespace smfree
