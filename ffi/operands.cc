// SPDX-License-Identifier: Apache-2.0
#include "ffi/operands.h"

#include <sstream>
#include <string>

namespace smfree {
namespace {

DType DTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return DType::kF32;
    case ffi::BF16: return DType::kBF16;
    case ffi::F16: return DType::kF16;
    case ffi::F8E4M3FN: return DType::kE4M3;
    case ffi::F8E5M2: return DType::kE5M2;
    default: return DType::kOther;
  }
}

DType WireValues(int64_t bits) {
  switch (bits) {
    case 43: return DType::kE4M3;
    case 52: return DType::kE5M2;
    default: return DType::kOther;
  }
}

ffi::AnyBuffer BufferOf(ffi::AnyBuffer buffer) { return buffer; }
ffi::AnyBuffer BufferOf(Out<ffi::AnyBuffer> buffer) { return *buffer; }

// Buffer: what is got from `leaves`.
template <typename Rows, typename Buffer, typename Leaves>
LeavesOf<Rows> Collect(const Attributes& attributes, const Leaves& leaves, Use use) {
  LeavesOf<Rows> of;
  RowFormat& format = of.rows.format;
  format.quantisation = {WireValues(attributes.wire_values),
                         static_cast<int32_t>(attributes.wire_block),
                         attributes.wire_power_of_two != 0};
  if (leaves.size() > kMaxLeaves) {
    of.wrong = "rows of " + std::to_string(leaves.size()) + " arrays, expected at most " +
               std::to_string(kMaxLeaves);
    return of;
  }
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    const auto got = leaves.template get<Buffer>(leaf);
    if (!got.has_value()) {
      of.wrong = "a row operand that is no array";
      return of;
    }
    const ffi::AnyBuffer buffer = BufferOf(got.value());
    const auto shape = buffer.dimensions();
    if (shape.size() != 2 || (leaf > 0 && shape[0] != of.count)) {
      of.wrong = "arrays of rows with other numbers of rows";
      return of;
    }
    const DType dtype = DTypeOf(buffer.element_type());
    if (use == Use::kCompute && dtype == DType::kOther) {
      std::ostringstream text;
      text << "rows of " << buffer.element_type() << " in array " << leaf
           << ", expected F32, BF16, F16, F8E4M3FN or F8E5M2, which can be added. Only a dispatch "
              "carries others";
      of.wrong = text.str();
      return of;
    }
    of.count = shape[0];
    of.rows.leaves[leaf] = buffer.untyped_data();
    format.Add(dtype, static_cast<int32_t>(ffi::ByteWidth(buffer.element_type())),
               static_cast<int32_t>(shape[1]));
  }
  return of;
}

}  // namespace

LeavesOf<RowsIn> RowsOf(const Attributes& attributes, const LeavesIn& leaves, Use use) {
  return Collect<RowsIn, ffi::AnyBuffer>(attributes, leaves, use);
}

LeavesOf<RowsOut> RowsOf(const Attributes& attributes, const LeavesOut& leaves, Use use) {
  return Collect<RowsOut, ffi::AnyBuffer>(attributes, leaves, use);
}

std::string WrongOfPair(const LeavesOf<RowsIn>& in, const LeavesOf<RowsOut>& out) {
  if (!out.wrong.empty()) return out.wrong;
  if (!in.wrong.empty()) return in.wrong;
  const RowFormat& a = in.rows.format;
  const RowFormat& b = out.rows.format;
  bool same = in.count == out.count && a.count == b.count;
  for (int32_t leaf = 0; same && leaf < a.count; ++leaf) {
    same = a.leaves[leaf].dtype == b.leaves[leaf].dtype &&
           a.leaves[leaf].width == b.leaves[leaf].width;
  }
  return same ? "" : "operands and results that are not rows of one kind";
}

Status CheckShapes(const GroupConfig& config, int64_t tokens, int64_t stride,
                   const std::optional<Ints>& received, const std::string& wrong) {
  if (!wrong.empty()) return Status(FaultKind::kInvalidArgument, wrong + ".");
  std::string text;
  if (stride > AlignUp(config.row_bytes, kRowAlignment)) {
    text = "rows take " + std::to_string(stride) + " bytes on the wire, and those of the group " +
           std::to_string(config.row_bytes);
  }
  if (text.empty() && received) {
    const auto of = received->dimensions();
    if (of.size() != 2 || of[0] != WireRows(config, tokens) || of[1] != config.top_k) {
      text = "the routing of received rows is not " + std::to_string(WireRows(config, tokens)) +
             " rows of top_k " + std::to_string(config.top_k);
    }
  }
  if (text.empty()) return {};
  return Status(FaultKind::kInvalidArgument,
                text + "; the program was compiled for another EpConfig. Compile it again.");
}

}  // namespace smfree
