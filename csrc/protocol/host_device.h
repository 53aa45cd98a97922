// SPDX-License-Identifier: Apache-2.0
//
// SMFREE_HD marks a function of the protocol that both a C++ compiler and nvcc translate: the CPU
// backend, the CUDA handlers and the kernels then run the same line of code.
#ifndef SMFREE_CSRC_PROTOCOL_HOST_DEVICE_H_
#define SMFREE_CSRC_PROTOCOL_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define SMFREE_HD __host__ __device__
#else
#define SMFREE_HD
#endif

#endif  // SMFREE_CSRC_PROTOCOL_HOST_DEVICE_H_
