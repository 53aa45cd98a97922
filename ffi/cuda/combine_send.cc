// SPDX-License-Identifier: Apache-2.0
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error Send(cudaStream_t stream, int32_t device, const TokenArg& token,
                const PositionArg& position, const ffi::AnyBuffer& y, const float* weights,
                const float* values, const Ints& rows, const Ints& recv_counts,
                TokenRet& token_out, const Attributes& attributes) {
  auto begun = BeginCall(device, token, position, attributes, rows.dimensions()[1], y, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::CombineSendArgs args{call};
  args.rows_capacity = y.dimensions()[0];
  args.y = y.untyped_data();
  args.w = weights;
  args.values = values;
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  return ToError(cuda::CombineSend(*rank, args, stream));
}

ffi::Error CombineSend(cudaStream_t stream, int32_t device, TokenArg token, PositionArg position,
                       ffi::AnyBuffer y, Floats values, Ints rows, Ints recv_counts,
                       TokenRet token_out, Attributes attributes) {
  return Send(stream, device, token, position, y, /*weights=*/nullptr, OrNull(values), rows,
              recv_counts, token_out, attributes);
}

ffi::Error CombineSendWeighted(cudaStream_t stream, int32_t device, TokenArg token,
                               PositionArg position, ffi::AnyBuffer y, Floats weights, Ints rows,
                               Ints recv_counts, TokenRet token_out, Attributes attributes) {
  return Send(stream, device, token, position, y, weights.typed_data(), /*values=*/nullptr, rows,
              recv_counts, token_out, attributes);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaCombineSend, CombineSend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // y
                                  .Arg<Floats>()           // values
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Attrs<Attributes>(),
                              kCapturable);

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaCombineSendWeighted, CombineSendWeighted,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // y
                                  .Arg<Floats>()           // weights
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Attrs<Attributes>(),
                              kCapturable);

}  // namespace smfree
