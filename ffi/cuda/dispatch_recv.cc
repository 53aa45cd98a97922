// SPDX-License-Identifier: Apache-2.0
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Error DispatchRecv(cudaStream_t stream, int32_t device, TokenArg token, PositionArg position,
                        TokenRet token_out, ffi::Result<ffi::AnyBuffer> x,
                        ffi::Result<Floats> weights, ffi::Result<Ints> group_sizes,
                        ffi::Result<Ints> num_dropped, ffi::Result<Ints> rows,
                        ffi::Result<Ints> recv_counts, Attributes attributes) {
  auto begun =
      BeginCall(device, token, position, attributes, rows->dimensions()[1], *x, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::DispatchRecvArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.x = x->untyped_data();
  args.weights = weights->typed_data();
  args.group_sizes = group_sizes->typed_data();
  args.num_dropped = num_dropped->typed_data();
  args.rows = rows->typed_data();
  args.recv_counts = recv_counts->typed_data();
  return ToError(cuda::DispatchRecv(*rank, args, stream));
}

ffi::Error DispatchRecvCached(cudaStream_t stream, int32_t device, TokenArg token,
                              PositionArg position, Ints rows, Ints recv_counts,
                              TokenRet token_out, ffi::Result<ffi::AnyBuffer> x,
                              ffi::Result<Floats> values, Attributes attributes) {
  auto begun = BeginCall(device, token, position, attributes, rows.dimensions()[1], *x, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::DispatchRecvCachedArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  args.x = x->untyped_data();
  args.values = OrNull(values);
  return ToError(cuda::DispatchRecvCached(*rank, args, stream));
}

ffi::Error DispatchRecvWeighted(cudaStream_t stream, int32_t device, TokenArg token,
                                PositionArg position, ffi::AnyBuffer y, Floats weights, Ints rows,
                                Ints recv_counts, TokenRet token_out,
                                ffi::Result<ffi::AnyBuffer> x, ffi::Result<Floats> values,
                                Attributes attributes) {
  auto begun = BeginCall(device, token, position, attributes, rows.dimensions()[1], *x, token_out);
  if (!begun.ok()) return ToError(begun.status());
  auto& [rank, call] = begun.value();

  cuda::DispatchRecvCachedArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  args.y = y.untyped_data();
  args.w = weights.typed_data();
  args.x = x->untyped_data();
  args.values = values->typed_data();
  return ToError(cuda::DispatchRecvCached(*rank, args, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaDispatchRecv, DispatchRecv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // weights
                                  .Ret<Ints>()             // group_sizes
                                  .Ret<Ints>()             // num_dropped
                                  .Ret<Ints>()             // rows
                                  .Ret<Ints>()             // recv_counts
                                  .Attrs<Attributes>(),
                              kCapturable);

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaDispatchRecvCached, DispatchRecvCached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // values
                                  .Attrs<Attributes>(),
                              kCapturable);

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCudaDispatchRecvWeighted, DispatchRecvWeighted,
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
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // values
                                  .Attrs<Attributes>(),
                              kCapturable);

}  // namespace smfree
