# SPDX-License-Identifier: Apache-2.0
from . import bench as bench
from . import doctor as doctor
from . import inspect as inspect
from . import nn as nn
from . import plan as plan
from . import testing as testing
from ._src.api import combine_recv as combine_recv
from ._src.api import combine_send as combine_send
from ._src.api import dispatch_recv as dispatch_recv
from ._src.api import dispatch_send as dispatch_send
from ._src.api import overlap as overlap
from ._src.api import tie as tie
from ._src.config import EpConfig as EpConfig
from ._src.errors import SmfreeError as SmfreeError
from ._src.fp8 import Fp8 as Fp8
from ._src.fp8 import Quantized as Quantized
from ._src.group import EpGroup as EpGroup
from ._src.hints import nvl_size_hint as nvl_size_hint
from ._src.hints import rdma_size_hint as rdma_size_hint
from ._src.one_call import RecvHook as RecvHook
from ._src.one_call import combine as combine
from ._src.one_call import dispatch as dispatch
from ._src.remat import save_comm_policy as save_comm_policy
from ._src.targets import DISABLE_JAX_EXPORT_CHECKS as DISABLE_JAX_EXPORT_CHECKS
from ._src.token import DispatchResult as DispatchResult
from ._src.token import Handle as Handle
from ._src.token import InFlight as InFlight
from ._src.token import Token as Token
from .inspect.report import overlap_report as overlap_report

__version__: str
