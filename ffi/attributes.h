// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of all phases and platforms share: token, position, attributes, errors.
#ifndef SMFREE_FFI_ATTRIBUTES_H_
#define SMFREE_FFI_ATTRIBUTES_H_

#include <cstdint>

#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace smfree {

namespace ffi = xla::ffi;

struct Attributes {
  int64_t group;
  int64_t lane;
  int64_t derivation;
  int64_t call_site;
  int64_t tokens;  // T
  // How rows are quantised on the wire: bits of the values (0: not at all; 43: E4M3, 52: E5M2),
  // elements of a block, whether scales are powers of two.
  int64_t wire_values, wire_block, wire_power_of_two;
};

using TokenArg = ffi::Buffer<ffi::F32, 1>;
using TokenRet = ffi::Result<TokenArg>;
using PositionArg = ffi::Buffer<ffi::S32, 1>;  // {rank, replica}

// The program's attributes and operands name no open group of this process.
Status NoSuchGroup();

ffi::Error ToError(const Status& status);

}  // namespace smfree

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(smfree::Attributes,
                                      xla::ffi::StructMember<int64_t>("group"),
                                      xla::ffi::StructMember<int64_t>("lane"),
                                      xla::ffi::StructMember<int64_t>("derivation"),
                                      xla::ffi::StructMember<int64_t>("call_site"),
                                      xla::ffi::StructMember<int64_t>("tokens"),
                                      xla::ffi::StructMember<int64_t>("wire_values"),
                                      xla::ffi::StructMember<int64_t>("wire_block"),
                                      xla::ffi::StructMember<int64_t>("wire_power_of_two"));

#endif  // SMFREE_FFI_ATTRIBUTES_H_
