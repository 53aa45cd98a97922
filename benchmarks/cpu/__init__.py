# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on CPU devices, against other JAX ways.

__main__   the command: shapes, and the processes that they run in
measure    in each of these processes: `jax_smfree.bench.measure`, shape by shape
report     the results as Markdown
plot       the results as a picture
"""
