// SPDX-License-Identifier: Apache-2.0
//
// The FFI handlers, one or more per phase. The custom call of SmfreeDispatchSend is
// "smfree_dispatch_send", and so on; operands and results stand in jax_smfree/_src/primitives.py.
#ifndef SMFREE_FFI_HANDLERS_H_
#define SMFREE_FFI_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace smfree {

XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeDispatchSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeDispatchSendCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeDispatchRecv);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeDispatchRecvCached);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeDispatchRecvWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCombineSend);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCombineSendWeighted);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeCombineRecv);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SmfreeNewSendInstance);  // instantiate stage of the sends

}  // namespace smfree

#endif  // SMFREE_FFI_HANDLERS_H_
