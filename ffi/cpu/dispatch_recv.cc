// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <utility>

#include "ffi/cpu/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Future DispatchRecv(TokenArg token, PositionArg position, TokenRet token_out,
                         ffi::Result<ffi::AnyBuffer> x, ffi::Result<Floats> weights,
                         ffi::Result<Ints> group_sizes, ffi::Result<Ints> num_dropped,
                         ffi::Result<Ints> rows, ffi::Result<Ints> recv_counts,
                         Attributes attributes) {
  auto operation = BeginRecv(token, position, attributes, rows->dimensions()[1]);
  if (!operation.ok()) return Done(operation.status());
  auto& [group, call, _] = operation.value();
  if (Status status = CheckRows(group->config(), *x); !status.ok()) return Done(status);

  cpu::DispatchRecvArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.x = x->untyped_data();
  args.weights = weights->typed_data();
  args.group_sizes = group_sizes->typed_data();
  args.num_dropped = num_dropped->typed_data();
  args.rows = rows->typed_data();
  args.recv_counts = recv_counts->typed_data();
  WriteReady(operation.value(), token_out);
  return Receive([&](cpu::Done done) { cpu::DispatchRecv(*group, args, std::move(done)); });
}

ffi::Future DispatchRecvCached(TokenArg token, PositionArg position, Ints rows, Ints recv_counts,
                               TokenRet token_out, ffi::Result<ffi::AnyBuffer> x,
                               ffi::Result<Floats> values, Attributes attributes) {
  auto operation = BeginRecv(token, position, attributes, rows.dimensions()[1]);
  if (!operation.ok()) return Done(operation.status());
  auto& [group, call, incoming] = operation.value();
  if (Status status = CheckRows(group->config(), *x); !status.ok()) return Done(status);
  WriteReady(operation.value(), token_out);
  if (incoming.zero()) {  // nothing was sent: the cotangent is zero
    std::memset(x->untyped_data(), 0, x->size_bytes());
    std::memset(values->typed_data(), 0, values->size_bytes());
    return Done({});
  }

  cpu::DispatchRecvCachedArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  args.x = x->untyped_data();
  args.values = OrNull(values);
  return Receive([&](cpu::Done done) { cpu::DispatchRecvCached(*group, args, std::move(done)); });
}

ffi::Future DispatchRecvWeighted(TokenArg token, PositionArg position, ffi::AnyBuffer y,
                                 Floats weights, Ints rows, Ints recv_counts, TokenRet token_out,
                                 ffi::Result<ffi::AnyBuffer> x, ffi::Result<Floats> values,
                                 Attributes attributes) {
  auto operation = BeginRecv(token, position, attributes, rows.dimensions()[1]);
  if (!operation.ok()) return Done(operation.status());
  auto& [group, call, incoming] = operation.value();
  if (Status status = CheckRows(group->config(), *x); !status.ok()) return Done(status);
  WriteReady(operation.value(), token_out);
  if (incoming.zero()) {
    std::memset(x->untyped_data(), 0, x->size_bytes());
    std::memset(values->typed_data(), 0, values->size_bytes());
    return Done({});
  }

  cpu::DispatchRecvWeightedArgs args{call};
  args.rows_capacity = x->dimensions()[0];
  args.y = y.untyped_data();
  args.w = weights.typed_data();
  args.rows = rows.typed_data();
  args.recv_counts = recv_counts.typed_data();
  args.x = x->untyped_data();
  args.values = values->typed_data();
  return Receive([&](cpu::Done done) { cpu::DispatchRecvWeighted(*group, args, std::move(done)); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuDispatchRecv, DispatchRecv,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // weights
                                  .Ret<Ints>()             // group_sizes
                                  .Ret<Ints>()             // num_dropped
                                  .Ret<Ints>()             // rows
                                  .Ret<Ints>()             // recv_counts
                                  .Attrs<Attributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuDispatchRecvCached, DispatchRecvCached,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // values
                                  .Attrs<Attributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuDispatchRecvWeighted, DispatchRecvWeighted,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<ffi::AnyBuffer>()   // y
                                  .Arg<Floats>()           // weights
                                  .Arg<Ints>()             // rows
                                  .Arg<Ints>()             // recv_counts
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // x
                                  .Ret<Floats>()           // values
                                  .Attrs<Attributes>());

}  // namespace smfree
