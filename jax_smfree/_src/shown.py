# SPDX-License-Identifier: Apache-2.0
"""What was given, for the text of an error. Without JAX, for the sake of `jax_smfree.testing`."""

import numbers
from typing import Any

import numpy as np


def shown(value: Any) -> str:
    """``value`` for an error's text: itself if that is short, else its type."""
    if value is None or isinstance(value, (bool, numbers.Number, np.generic, str, bytes)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
