// SPDX-License-Identifier: Apache-2.0
#include "ffi/cpu/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error Send(const TokenArg& token, const PositionArg& position, const ffi::AnyBuffer& y,
                const float* weights, const float* values, const Ints& rows,
                const Ints& recv_counts, TokenRet& token_out, const SendInstance& instance,
                ffi::RunId run_id, const Attributes& attributes) {
  auto operation = BeginSend(token, position, attributes, instance, run_id, rows.dimensions()[1]);
  if (!operation.ok()) return ToError(operation.status());
  auto& [group, call, _] = operation.value();
  if (Status status = CheckRows(group->config(), y); !status.ok()) return ToError(status);

  cpu::CombineSendArgs args{call};
  args.rows_capacity = y.dimensions()[0];
  args.y = y.untyped_data();
  args.w = weights;
  args.values = values;
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  if (Status status = cpu::CombineSend(*group, args); !status.ok()) return ToError(status);
  WriteInFlight(operation.value(), token_out);
  return ffi::Error::Success();
}

ffi::Error CombineSend(TokenArg token, PositionArg position, ffi::AnyBuffer y, Floats values,
                       Ints rows, Ints recv_counts, TokenRet token_out, SendInstance* instance,
                       ffi::RunId run_id, Attributes attributes) {
  return Send(token, position, y, /*weights=*/nullptr, OrNull(values), rows, recv_counts, token_out,
              *instance, run_id, attributes);
}

ffi::Error CombineSendWeighted(TokenArg token, PositionArg position, ffi::AnyBuffer y,
                               Floats weights, Ints rows, Ints recv_counts, TokenRet token_out,
                               SendInstance* instance, ffi::RunId run_id, Attributes attributes) {
  return Send(token, position, y, weights.typed_data(), /*values=*/nullptr, rows, recv_counts,
              token_out, *instance, run_id, attributes);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuCombineSend, CombineSend,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // y
                                  .Arg<Floats>()           // values
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Ctx<ffi::State<SendInstance>>()
                                  .Ctx<ffi::RunId>()
                                  .Attrs<Attributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuCombineSendWeighted, CombineSendWeighted,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // y
                                  .Arg<Floats>()           // weights
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Ctx<ffi::State<SendInstance>>()
                                  .Ctx<ffi::RunId>()
                                  .Attrs<Attributes>());

}  // namespace smfree
