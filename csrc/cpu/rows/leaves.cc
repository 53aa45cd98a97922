// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/leaves.h"

#include <algorithm>
#include <cstring>

#include "csrc/cpu/rows/quantised.h"

namespace smfree::cpu {
namespace {

const std::byte* RowOf(const RowsIn& rows, int32_t leaf, int64_t row) {
  return static_cast<const std::byte*>(rows.leaves[leaf]) + row * rows.format.leaves[leaf].bytes();
}

std::byte* RowOf(const RowsOut& rows, int32_t leaf, int64_t row) {
  return static_cast<std::byte*>(rows.leaves[leaf]) + row * rows.format.leaves[leaf].bytes();
}

int64_t BytesInMessage(const RowFormat& format, const Leaf& leaf) {
  if (!leaf.quantised) return leaf.bytes();
  return leaf.scales_offset() + int64_t{leaf.width} / format.quantisation.block * 4;
}

// Room for a row of any quantised leaf in float32.
std::vector<float> WideRow(const RowFormat& format) {
  int32_t width = 0;
  for (int32_t l = 0; l < format.count; ++l) {
    if (format.leaves[l].quantised) width = std::max(width, format.leaves[l].width);
  }
  return std::vector<float>(static_cast<size_t>(width));
}

}  // namespace

RowsIn RowsOfMessage(const std::byte* rows, int64_t stride) {
  RowsIn of;
  of.format.Add(DType::kOther, /*item_bytes=*/1, static_cast<int32_t>(stride));
  of.leaves[0] = rows;
  return of;
}

void FillRows(const RowsOut& rows, int64_t begin, int64_t end, int byte) {
  for (int32_t l = 0; l < rows.format.count; ++l) {
    std::memset(RowOf(rows, l, begin), byte,
                static_cast<size_t>((end - begin) * rows.format.leaves[l].bytes()));
  }
}

RowPacker::RowPacker(const RowsIn& from) : from_(from), wide_(WideRow(from.format)) {
  if (!wide_.empty()) quantised_.resize(static_cast<size_t>(from.format.stride));
}

void RowPacker::Read(int64_t row) {
  const RowFormat& format = from_.format;
  for (int32_t l = 0; l < format.count; ++l) {
    const Leaf& leaf = format.leaves[l];
    leaves_[l] = RowOf(from_, l, row);
    if (!leaf.quantised) continue;
    AddRow(leaf.dtype, wide_.data(), {leaves_[l], 1.0f}, /*first=*/true, leaf.width);
    std::byte* const quantised = quantised_.data() + leaf.offset;
    QuantiseRow(format.quantisation, leaf, quantised, wide_.data());
    leaves_[l] = quantised;
  }
}

void RowPacker::Write(std::byte* to, Writes writes) const {
  const RowFormat& format = from_.format;
  for (int32_t l = 0; l < format.count; ++l) {
    const Leaf& leaf = format.leaves[l];
    CopyRow(to + leaf.offset, leaves_[l], BytesInMessage(format, leaf), writes);
  }
}

RowUnpacker::RowUnpacker(const RowsOut& to) : to_(to), wide_(WideRow(to.format)) {
  for (int32_t l = 0; l < to.format.count; ++l) {
    const Leaf& leaf = to.format.leaves[l];
    if (leaf.quantised) dequantised_[l].resize(static_cast<size_t>(leaf.bytes()));
  }
}

void RowUnpacker::Read(const std::byte* row) {
  const RowFormat& format = to_.format;
  for (int32_t l = 0; l < format.count; ++l) {
    const Leaf& leaf = format.leaves[l];
    leaves_[l] = row + leaf.offset;
    if (!leaf.quantised) continue;
    AddQuantisedRow(format.quantisation, leaf, wide_.data(), leaves_[l], /*first=*/true);
    RoundRow(leaf.dtype, dequantised_[l].data(), wide_.data(), leaf.width);
    leaves_[l] = dequantised_[l].data();
  }
}

void RowUnpacker::Write(int64_t n, Writes writes) const {
  for (int32_t l = 0; l < to_.format.count; ++l) {
    CopyRow(RowOf(to_, l, n), leaves_[l], to_.format.leaves[l].bytes(), writes);
  }
}

float RowUnpacker::WriteScaled(int64_t n, const RowsIn& y, float w, Writes writes) {
  float product = 0.0f;
  for (int32_t l = 0; l < to_.format.count; ++l) {
    const Leaf& leaf = to_.format.leaves[l];
    if (scaled_.size() < static_cast<size_t>(leaf.bytes())) {
      scaled_.resize(static_cast<size_t>(leaf.bytes()));
    }
    const float of_leaf = ScaleRowAndDot(leaf.dtype, RowOf(to_, l, n), scaled_.data(), leaves_[l],
                                         RowOf(y, l, n), w, leaf.width, writes);
    product = l == 0 ? of_leaf : product + of_leaf;
  }
  return product;
}

RowSum::RowSum(const RowFormat& format, int64_t max_terms)
    : format_(format),
      max_terms_(max_terms),
      terms_(static_cast<size_t>(format.count * max_terms)),
      wide_(WideRow(format)) {}

void RowSum::Clear() {
  num_terms_ = num_packed_ = 0;
  lost_ = false;
}

void RowSum::AddPacked(const std::byte* row) {
  for (int32_t l = 0; l < format_.count; ++l) {
    TermsOf(l)[num_terms_] = {row + format_.leaves[l].offset, 1.0f};
  }
  num_packed_ = ++num_terms_;
}

void RowSum::Add(const RowsIn& rows, int64_t row, float weight) {
  for (int32_t l = 0; l < format_.count; ++l) {
    TermsOf(l)[num_terms_] = {RowOf(rows, l, row), weight};
  }
  ++num_terms_;
}

const float* RowSum::WideSum(int32_t l) {
  const Leaf& leaf = format_.leaves[l];
  const WeightedRow* const terms = TermsOf(l);
  for (int64_t term = 0; term < num_terms_; ++term) {
    const bool first = term == 0;
    if (term < num_packed_) {
      AddQuantisedRow(format_.quantisation, leaf, wide_.data(), terms[term].row, first);
    } else {
      AddRow(leaf.dtype, wide_.data(), terms[term], first, leaf.width);
    }
  }
  return wide_.data();
}

void RowSum::Store(const RowsOut& to, int64_t row) {
  if (lost_) return FillRows(to, row, row + 1, 0xff);
  for (int32_t l = 0; l < format_.count; ++l) {
    const Leaf& leaf = format_.leaves[l];
    if (leaf.quantised && num_packed_ > 0) {
      RoundRow(leaf.dtype, RowOf(to, l, row), WideSum(l), leaf.width);
    } else {
      SumRows(leaf.dtype, RowOf(to, l, row), TermsOf(l), num_terms_, leaf.width);
    }
  }
}

void RowSum::Pack(std::byte* to) {
  if (lost_ || num_terms_ == 0) {
    std::memset(to, lost_ ? 0xff : 0, static_cast<size_t>(format_.stride));
    return;
  }
  for (int32_t l = 0; l < format_.count; ++l) {
    const Leaf& leaf = format_.leaves[l];
    if (leaf.quantised) {
      QuantiseRow(format_.quantisation, leaf, to + leaf.offset, WideSum(l));
    } else {
      SumRows(leaf.dtype, to + leaf.offset, TermsOf(l), num_terms_, leaf.width);
    }
  }
}

}  // namespace smfree::cpu
