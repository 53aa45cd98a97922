// SPDX-License-Identifier: Apache-2.0
//
// The FFI handlers, one or more per phase and platform. The custom call of Smfree…DispatchSend is
// "smfree_dispatch_send", and so on; operands and results stand in jax_smfree/_src/primitives.py.
#ifndef SMFREE_FFI_HANDLERS_H_
#define SMFREE_FFI_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace smfree {

XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuDispatchSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuDispatchSendCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuDispatchRecv);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuDispatchRecvCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuDispatchRecvWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuCombineSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuCombineSendWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuCombineRecv);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCpuNewSendInstance);  // instantiate stage of the sends

XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaDispatchSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaDispatchSendCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaDispatchRecv);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaDispatchRecvCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaDispatchRecvWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaCombineSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaCombineSendWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCudaCombineRecv);

}  // namespace smfree

#endif  // SMFREE_FFI_HANDLERS_H_
