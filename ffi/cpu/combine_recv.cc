// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <utility>

#include "ffi/cpu/decode.h"
#include "ffi/handlers.h"

namespace smfree {
namespace {

ffi::Future CombineRecv(TokenArg token, PositionArg position, Ints places, Ints send_counts,
                        TokenRet token_out, ffi::Result<ffi::AnyBuffer> out,
                        ffi::Result<Floats> slots, Attributes attributes) {
  auto operation = BeginRecv(token, position, attributes, places.dimensions()[0]);
  if (!operation.ok()) return Done(operation.status());
  auto& [group, call, incoming] = operation.value();
  if (Status status = CheckRows(group->config(), *out); !status.ok()) return Done(status);
  WriteReady(operation.value(), token_out);
  if (incoming.zero()) {  // nothing was sent: the cotangent is zero
    std::memset(out->untyped_data(), 0, out->size_bytes());
    std::memset(slots->typed_data(), 0, slots->size_bytes());
    return Done({});
  }

  cpu::CombineRecvArgs args{call};
  args.places = places.typed_data();
  args.send_counts = send_counts.typed_data();
  args.out = out->untyped_data();
  args.slots = OrNull(slots);
  return Receive([&](cpu::Done done) { cpu::CombineRecv(*group, args, std::move(done)); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SmfreeCpuCombineRecv, CombineRecv,
                              ffi::Ffi::Bind()
                                  .Arg<TokenArg>()         // token
                                  .Arg<PositionArg>()      // position
                                  .Arg<Ints>()             // places
                                  .Arg<Ints>()             // send_counts
                                  .Ret<TokenArg>()         // token
                                  .Ret<ffi::AnyBuffer>()   // out
                                  .Ret<Floats>()           // slots
                                  .Attrs<Attributes>());

}  // namespace smfree
