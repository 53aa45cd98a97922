// SPDX-License-Identifier: Apache-2.0
//
// The CUDA handlers. Tokens and positions are device memory: the kernels read them.
#include <cstdint>

#include "csrc/cuda/backend.h"
#include "ffi/combine_recv.h"
#include "ffi/combine_send.h"
#include "ffi/dispatch_recv.h"
#include "ffi/dispatch_send.h"
#include "ffi/module.h"

namespace smfree {
namespace {

// The stage at which XLA creates the call, in the order of the program's schedule.
template <auto compile, Operation operation>
nb::capsule Creating() {
  constexpr auto create = [](Attributes attributes) {
    return ToError(compile({attributes.group, static_cast<int32_t>(attributes.lane),
                            static_cast<int32_t>(attributes.derivation),
                            static_cast<uint32_t>(attributes.call_site), operation}));
  };
  XLA_FFI_DEFINE_HANDLER(handler, create, ffi::Ffi::BindInstantiate().Attrs<Attributes>());
  return Handler(handler);
}

// The handler, by stage, that runs `phase` on the arrays of `operands_of`. It only launches
// kernels, the same ones each time: XLA may capture them into a CUDA graph and replay it.
template <auto compile, Operation operation, auto phase, auto operands_of>
nb::dict HandlerOf() {
  constexpr auto launch = [](cudaStream_t stream, int32_t device, ffi::RunId run, TokenArg token,
                             PositionArg position, TokenRet token_out, Attributes attributes,
                             auto... buffers) {
    const auto operands = operands_of(attributes, buffers...);
    const auto rank = cuda::FindRank(attributes.group, device);
    if (rank == nullptr) return ToError(NoSuchGroup());
    const Status status = CheckShapes(cuda::ConfigOf(*rank), attributes, operands);
    if (!status.ok()) return ToError(status);
    cuda::Call call;
    call.run = run.run_id;
    call.lane = static_cast<int32_t>(attributes.lane);
    call.derivation = static_cast<int32_t>(attributes.derivation);
    call.call_site = static_cast<uint32_t>(attributes.call_site);
    call.tokens = attributes.tokens;
    call.token = token.typed_data();
    call.position = position.typed_data();
    call.token_out = token_out->typed_data();
    return ToError(phase(*rank, call, operands.arrays, stream));
  };
  XLA_FFI_DEFINE_HANDLER(handler, launch,
                         BindOperands(ffi::Ffi::Bind()
                                          .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                          .Ctx<ffi::DeviceOrdinal>()
                                          .Ctx<ffi::RunId>()
                                          .Arg<TokenArg>()
                                          .Arg<PositionArg>()
                                          .Ret<TokenArg>()
                                          .Attrs<Attributes>(),
                                      operands_of),
                         {ffi::Traits::kCmdBufferCompatible});
  nb::dict stages;
  stages["instantiate"] = Creating<compile, operation>();
  stages["execute"] = Handler(handler);
  return stages;
}

template <Operation operation, auto phase, auto operands_of>
nb::dict Sending() {
  return HandlerOf<cuda::CompileSend, operation, phase, operands_of>();
}
template <Operation operation, auto phase, auto operands_of>
nb::dict Receiving() {
  return HandlerOf<cuda::CompileRecv, operation, phase, operands_of>();
}

}  // namespace

nb::dict CudaTargets() {
  constexpr Operation kDispatch = Operation::kDispatch, kCombine = Operation::kCombine;
  nb::dict targets;
  targets["smfree_dispatch_send"] =
      Sending<kDispatch, cuda::DispatchSend, DispatchSendOperands>();
  targets["smfree_dispatch_send_cached"] =
      Sending<kDispatch, cuda::DispatchSendCached, DispatchSendCachedOperands>();
  targets["smfree_dispatch_recv"] =
      Receiving<kDispatch, cuda::DispatchRecv, DispatchRecvOperands>();
  targets["smfree_dispatch_recv_cached"] =
      Receiving<kDispatch, cuda::DispatchRecvCached, DispatchRecvCachedOperands>();
  targets["smfree_dispatch_recv_weighted"] =
      Receiving<kDispatch, cuda::DispatchRecvCached, DispatchRecvWeightedOperands>();
  targets["smfree_combine_send"] = Sending<kCombine, cuda::CombineSend, CombineSendOperands>();
  targets["smfree_combine_send_weighted"] =
      Sending<kCombine, cuda::CombineSend, CombineSendWeightedOperands>();
  targets["smfree_combine_recv"] = Receiving<kCombine, cuda::CombineRecv, CombineRecvOperands>();
  return targets;
}

}  // namespace smfree
