// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of all phases and platforms share: token, position, attributes, errors.
#ifndef SMFREE_FFI_ATTRIBUTES_H_
#define SMFREE_FFI_ATTRIBUTES_H_

#include <cstdint>

#include "csrc/protocol/group_config.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace smfree {

namespace ffi = xla::ffi;

struct Attributes {
  int64_t group;
  int64_t lane;
  int64_t derivation;
  int64_t call_site;
};

using TokenArg = ffi::Buffer<ffi::F32, 1>;
using TokenRet = ffi::Result<TokenArg>;
using PositionArg = ffi::Buffer<ffi::S32, 1>;  // {rank, replica}

// The rows are [*, hidden] in the group's dtype.
Status CheckRows(const GroupConfig& config, const ffi::AnyBuffer& rows);

// Of the program's attributes and operands that name no open group of this process.
Status NoSuchGroup();

ffi::Error ToError(const Status& status);

}  // namespace smfree

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(smfree::Attributes,
                                      xla::ffi::StructMember<int64_t>("group"),
                                      xla::ffi::StructMember<int64_t>("lane"),
                                      xla::ffi::StructMember<int64_t>("derivation"),
                                      xla::ffi::StructMember<int64_t>("call_site"));

#endif  // SMFREE_FFI_ATTRIBUTES_H_
