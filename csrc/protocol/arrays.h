// SPDX-License-Identifier: Apache-2.0
//
// What the phases read and write, the same on all platforms: host memory of the CPU backend, device
// memory of the CUDA backend.
//
// Sizes, per rank: R ranks, E experts, El = E / R local experts, T rows sent (equal on all ranks,
// at most max_tokens), K top_k, P = min(K, R) places of a row, B = WireRows(config, T) the most rows
// that are kept of those received, N rows of the expert-grouped arrays. A row is what its RowFormat
// says; x[n] stands for row n of all its leaves, and [T] and [N] below for arrays of so many rows.
// All arrays are dense and row-major.
//
// Of the rows that come here the first B are kept, sources ascending (KeptRows), and numbered
// through: the i-th row from source s is number first[s] + i, first[s] = sum of recv_counts[s'],
// s' < s. The others are cut: they have no row of the expert-grouped array, and a combine returns
// nothing for them. In hierarchical mode a relay hands on no more than B rows of a dispatch.
//
// Where Overflow::kError is the policy, what is lost is NaN wherever it is missed: bytes of 0xff,
// which are NaNs of every float and -1 of every signed integer.
//
//   places      int32[T,P]    destination_rank * T + position in that destination's list,
//                             ascending; -1 fills the end (PROTOCOL.md, S2)
//   send_counts int32[R]      rows sent to each rank
//   rows        int32[B,K]    of the received row of this number, its slot k: the row of the
//                             expert-grouped array, or -1; -1 past the last number
//   recv_counts int32[R]      rows kept of those from each rank
//   relay       int32[M,T,Q]  hierarchical mode: of the rank of this index in node n of M, its i-th
//                             row on the wire to here: the places, index * T + position, in this
//                             node of L ranks that it goes on to; Q = min(K, L). -1 for a node of
//                             which this relay hands on nothing (IsTaken). Else [1,1,1], -1
//   slots       float32[T,K]  one value per (row, slot) that rides along with the row
#ifndef SMFREE_CSRC_PROTOCOL_ARRAYS_H_
#define SMFREE_CSRC_PROTOCOL_ARRAYS_H_

#include <cstdint>

#include "csrc/protocol/row_format.h"

namespace smfree {

// places, send_counts <- topk_idx; sends x rows with their expert ids and weights.
struct DispatchSendArrays {
  RowsIn x;                             // [T]
  const int32_t* topk_idx = nullptr;    // [T,K], -1 = no expert
  const float* topk_weights = nullptr;  // [T,K]
  int32_t* places = nullptr;            // out [T,P]
  int32_t* send_counts = nullptr;       // out [R]
};

// Sends x rows (with slots) along a known routing.
struct DispatchSendCachedArrays {
  RowsIn x;                              // [T]
  const float* slots = nullptr;          // [T,K] or null
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
};

// The expert-grouped rows and the routing of this receiver. All of every output is written; rows
// past the end and padding rows are zero. Of the N rows only the first `capacity` are filled, rounded
// down to a multiple of expert_alignment and clamped to [0, N]. num_dropped counts the copies that
// are not there: of rows that are cut, and what does not fit into those rows. num_rows are
// group_sizes without padding.
//
// Where groups are padded (GroupConfig), group e starts at row e * N / El, `capacity` is of each
// group and at most N / El, and rows past a group are not written, unless all are NaN.
struct DispatchRecvArrays {
  int64_t rows_capacity = 0;          // N
  const int32_t* capacity = nullptr;  // [1]
  RowsOut x;                          // out [N]
  float* weights = nullptr;           // out [N]
  int32_t* group_sizes = nullptr;     // out [El]
  int32_t* num_rows = nullptr;        // out [El]
  int32_t* num_dropped = nullptr;     // out [1]
  int32_t* rows = nullptr;            // out [B,K]
  int32_t* recv_counts = nullptr;     // out [R]
  int32_t* relay = nullptr;           // out [M,T,Q]
};

// With n = rows[b,k] and r = received row b: x[n] = r and values[n] = its slot k; weighted,
// x[n] = w[n] * r and values[n] = <y[n], r> in float32, over all leaves. Everything else is zero, or
// past a padded group. The sources send all their rows again; what is cut is what was cut, so the
// counts kept are recv_counts.
struct DispatchRecvCachedArrays {
  int64_t rows_capacity = 0;             // N
  const int32_t* rows = nullptr;         // [B,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
  RowsIn y;                              // [N], weighted: of the format of x; else unused
  const float* w = nullptr;              // [N], weighted; else null
  RowsOut x;                             // out [N]
  float* values = nullptr;               // out [N]; may be null if not weighted
};

// Returns to source s, for each of its rows b that were kept here, sum over k ascending of
// w[n] * y[n], n = rows[b,k], in float32, rounded once, to the wire; and as slot k values[n], or 0
// without n. A row without any n has lost all its copies: it is NaN, or zero if they were dropped.
struct CombineSendArrays {
  int64_t rows_capacity = 0;             // N
  RowsIn y;                              // [N]
  const float* w = nullptr;              // [N] or null: ones
  const float* values = nullptr;         // [N] or null: no slots
  const int32_t* rows = nullptr;         // [B,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
};

// out[t] = sum over the places of row t, ascending, of the row returned from there, and add[t], in
// float32, rounded once; slots likewise, without add. A place past the rows of its message was cut
// there: the row is NaN, or, if it was dropped, that place adds nothing. Rows without a place are
// add[t], or zero. In hierarchical mode the sum over the places of one node comes first, and is
// rounded too.
struct CombineRecvArrays {
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
  RowsIn add;                            // [T] of the format of out; or no leaves
  RowsOut out;                           // out [T]
  float* slots = nullptr;                // out [T,K] or null
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_ARRAYS_H_
