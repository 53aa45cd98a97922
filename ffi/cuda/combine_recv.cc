// SPDX-License-Identifier: Apache-2.0
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error CombineRecv(cudaStream_t stream, int32_t device, TokenArg token, PositionArg position,
                       Ints places, Ints send_counts, TokenRet token_out,
                       ffi::Result<ffi::AnyBuffer> out, ffi::Result<Floats> slots,
                       Attributes attributes) {
  auto begun =
      BeginCall(device, token, position, attributes, places.dimensions()[0], *out, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::CombineRecvArgs args{call};
  args.places = places.typed_data();
  args.send_counts = send_counts.typed_data();
  args.out = out->untyped_data();
  args.slots = OrNull(slots);
  return ToError(cuda::CombineRecv(*rank, args, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaCombineRecv, CombineRecv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<Ints>()             // places
                                  .Arg<Ints>()             // send_counts
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // out
                                  .Ret<Floats>()           // slots
                                  .Attrs<Attributes>(),
                              kCapturable);

}  // namespace smfree
