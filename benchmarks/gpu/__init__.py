# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on GPUs.

Commands (``python -m benchmarks.gpu COMMAND``), a file each:

operations   whole calls, phases, overlap, an MoE layer and JAX's own ways, at all shapes
layer        the MoE layer of three models: time over that of its matmuls, memory, kernels
quick        the first shape and 128 rows in a minute; two builds of the library side by side
decode       few rows: phases, whole operations, and a step of all layers of a model
deepep       DeepEP V1 beside the library
processes    a process per GPU beside one process
nodes        the hierarchical mode beside the direct one
kernels      every kernel under NVIDIA's profiler
matmul       grouped matmuls

What they share:

cases        shapes, their inputs, and how often everything is measured
timing       how programs are compiled and timed; copies and matrix products to compare with
library      the library's programs of a case, checked against the oracle
trace        what the library records about its kernels and copies
measures     what is measured of the library: calls, phases, overlap
peers        JAX's own ways
moe          an MoE layer, of the library and of JAX's own ways
report       the results of ``operations`` as Markdown, and what others show of them

Of one command each:

training, crossover, links, plot    parts of ``operations``, and its pictures
jitter                              the longest of many round trips, for ``decode``
layer_steps, kernel_times            what ``layer`` times, and a step kernel by kernel
deepep_figures                      what ``deepep`` compares, and how it is printed
node_bytes                          what ``nodes`` expects of the counters
matmul_cases, matmul_candidates     what ``matmul`` multiplies, and by what
matmul_rings, ring                  one of the candidates
"""
