# SPDX-License-Identifier: Apache-2.0
"""The error type of everything that goes wrong at run time."""


class SmfreeError(RuntimeError):
    """A communication fault: a missed deadline, a lost peer, ranks that disagree, or an overflow.

    Misuse that can be seen while tracing raises ``TypeError`` or ``ValueError`` instead.
    """
