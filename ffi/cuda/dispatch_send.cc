// SPDX-License-Identifier: Apache-2.0
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error DispatchSend(cudaStream_t stream, int32_t device, TokenArg token, PositionArg position,
                        ffi::AnyBuffer x, Ints topk_idx, Floats topk_weights, TokenRet token_out,
                        ffi::Result<Ints> places, ffi::Result<Ints> send_counts,
                        Attributes attributes) {
  auto begun = BeginCall(device, token, position, attributes, x.dimensions()[0], x, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::DispatchSendArgs args{call};
  args.x = x.untyped_data();
  args.topk_idx = topk_idx.typed_data();
  args.topk_weights = topk_weights.typed_data();
  args.places = places->typed_data();
  args.send_counts = send_counts->typed_data();
  return ToError(cuda::DispatchSend(*rank, args, stream));
}

ffi::Error DispatchSendCached(cudaStream_t stream, int32_t device, TokenArg token,
                              PositionArg position, ffi::AnyBuffer x, Floats slots, Ints places,
                              Ints send_counts, TokenRet token_out, Attributes attributes) {
  auto begun = BeginCall(device, token, position, attributes, x.dimensions()[0], x, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::DispatchSendCachedArgs args{call};
  args.x = x.untyped_data();
  args.slots = OrNull(slots);
  args.places = places.typed_data();
  args.send_counts = send_counts.typed_data();
  return ToError(cuda::DispatchSendCached(*rank, args, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaDispatchSend, DispatchSend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<Ints>()             // topk_idx
                                  .Arg<Floats>()           // topk_weights
                                  .Ret<TokenArg>()         // token
                                  .Ret<Ints>()             // places
                                  .Ret<Ints>()             // send_counts
                                  .Attrs<Attributes>(),
                              kCapturable);

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaDispatchSendCached, DispatchSendCached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<Floats>()           // slots
                                  .Arg<Ints>()             // places
                                  .Arg<Ints>()             // send_counts
                                  .Ret<TokenArg>()         // token
                                  .Attrs<Attributes>(),
                              kCapturable);

}  // namespace smfree
