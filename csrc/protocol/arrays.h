// SPDX-License-Identifier: Apache-2.0
//
// What the phases read and write, the same on all platforms: host memory of the CPU backend, device
// memory of the CUDA backend.
//
// Sizes, per rank: R ranks, E experts, El = E / R local experts, T rows sent (equal on all ranks,
// at most max_tokens), K top_k, P = min(K, R) places of a row, H hidden, N rows of the
// expert-grouped array. Rows are H elements of the group's dtype; all arrays are dense and
// row-major.
//
//   places      int32[T,P]    destination_rank * T + position in that destination's list,
//                             ascending; -1 fills the end (PROTOCOL.md, S2)
//   send_counts int32[R]      rows sent to each rank
//   rows        int32[R,T,K]  of source s, its i-th row here, its slot k: the row of the
//                             expert-grouped array, or -1
//   recv_counts int32[R]      rows received from each rank
//   relay       int32[M,T,Q]  hierarchical mode: of the rank of this index in node n of M, its i-th
//                             row on the wire to here: the places, index * T + position, in this
//                             node of L ranks that it goes on to; Q = min(K, L). Else [1,1,1], -1
//   slots       float32[T,K]  one value per (row, slot) that rides along with the row
#ifndef SMFREE_CSRC_PROTOCOL_ARRAYS_H_
#define SMFREE_CSRC_PROTOCOL_ARRAYS_H_

#include <cstdint>

namespace smfree {

// places, send_counts <- topk_idx; sends x rows with their expert ids and weights.
struct DispatchSendArrays {
  const void* x = nullptr;              // [T,H]
  const int32_t* topk_idx = nullptr;    // [T,K], -1 = no expert
  const float* topk_weights = nullptr;  // [T,K]
  int32_t* places = nullptr;            // out [T,P]
  int32_t* send_counts = nullptr;       // out [R]
};

// Sends x rows (with slots) along a known routing.
struct DispatchSendCachedArrays {
  const void* x = nullptr;               // [T,H]
  const float* slots = nullptr;          // [T,K] or null
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
};

// The expert-grouped rows and the routing of this receiver. All of every output is written; rows
// past the end and padding rows are zero.
struct DispatchRecvArrays {
  int64_t rows_capacity = 0;       // N
  void* x = nullptr;               // out [N,H]
  float* weights = nullptr;        // out [N]
  int32_t* group_sizes = nullptr;  // out [El]
  int32_t* num_dropped = nullptr;  // out [1]
  int32_t* rows = nullptr;         // out [R,T,K]
  int32_t* recv_counts = nullptr;  // out [R]
  int32_t* relay = nullptr;        // out [M,T,Q]
};

// With n = rows[s,i,k] and r = row i of source s: x[n] = r and values[n] = its slot k; weighted,
// x[n] = w[n] * r and values[n] = <y[n], r> in float32. Everything else is zero.
struct DispatchRecvCachedArrays {
  int64_t rows_capacity = 0;             // N
  const int32_t* rows = nullptr;         // [R,T,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
  const void* y = nullptr;               // [N,H], weighted; else null
  const float* w = nullptr;              // [N], weighted; else null
  void* x = nullptr;                     // out [N,H]
  float* values = nullptr;               // out [N]; may be null if not weighted
};

// Returns to source s, for its i-th row here, sum over k ascending of w[n] * y[n], n = rows[s,i,k],
// in float32, rounded once; and as slot k values[n], or 0 without n.
struct CombineSendArrays {
  int64_t rows_capacity = 0;             // N
  const void* y = nullptr;               // [N,H]
  const float* w = nullptr;              // [N] or null: ones
  const float* values = nullptr;         // [N] or null: no slots
  const int32_t* rows = nullptr;         // [R,T,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
};

// out[t] = sum over the places of row t, ascending, of the row returned from there, in float32,
// rounded once; slots likewise. Rows without a place are zero. In hierarchical mode the sum over
// the places of one node comes first, and is rounded too.
struct CombineRecvArrays {
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
  void* out = nullptr;                   // out [T,H]
  float* slots = nullptr;                // out [T,K] or null
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_ARRAYS_H_
