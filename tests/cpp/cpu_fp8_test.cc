// SPDX-License-Identifier: Apache-2.0
//
// Numbers of 8 bits, all of them and what rounds to them; quantised rows, bit by bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/cpu/rows/fp8.h"
#include "csrc/cpu/rows/quantised.h"
#include "csrc/cpu/rows/rows.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {
namespace {

constexpr DType kBoth[] = {DType::kE4M3, DType::kE5M2};

float Widened(DType dtype, uint32_t bits) {
  return dtype == DType::kE4M3 ? FromE4M3(bits) : FromE5M2(bits);
}

uint32_t Narrowed(DType dtype, float value) {
  return dtype == DType::kE4M3 ? ToE4M3(value) : ToE5M2(value);
}

TEST(AllNumbersOf8BitsWidenAndComeBack) {
  CHECK_EQ(FromE4M3(0x7eu), 448.0f);
  CHECK_EQ(FromE4M3(0x01u), 0x1p-9f);
  CHECK_EQ(FromE5M2(0x7bu), 57344.0f);
  CHECK_EQ(FromE5M2(0x01u), 0x1p-16f);
  CHECK_EQ(FromE5M2(0xfcu), -std::numeric_limits<float>::infinity());
  for (const DType dtype : kBoth) {
    std::vector<unsigned char> all(256);
    std::vector<float> wide(256);
    for (uint32_t bits = 0; bits < 256; ++bits) {
      all[bits] = static_cast<unsigned char>(bits);
      const auto number = static_cast<float>(NumberOf(dtype, bits));
      CHECK(Same(Widened(dtype, bits), number));
      CHECK_EQ(std::signbit(Widened(dtype, bits)), bits >= 0x80);
      if (!std::isnan(number)) CHECK_EQ(Narrowed(dtype, number), bits);
    }
    // Many at a time.
    AddRow(dtype, wide.data(), {reinterpret_cast<const std::byte*>(all.data()), 1.0f},
           /*first=*/true, 256);
    for (uint32_t bits = 0; bits < 256; ++bits) CHECK(Same(wide[bits], Widened(dtype, bits)));
  }
}

TEST(LargestAndBeyond) {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK_EQ(Narrowed(DType::kE4M3, 464.0f), 0x7eu);  // a tie between 448 and the 480 that is none
  CHECK_EQ(Narrowed(DType::kE4M3, std::nextafter(464.0f, 500.0f)), 0x7fu);
  CHECK_EQ(Narrowed(DType::kE4M3, -infinity), 0xffu);
  CHECK_EQ(Narrowed(DType::kE5M2, std::nextafter(61440.0f, 0.0f)), 0x7bu);
  CHECK_EQ(Narrowed(DType::kE5M2, 61440.0f), 0x7cu);
  CHECK_EQ(Narrowed(DType::kE5M2, -1e30f), 0xfcu);
  CHECK_EQ(Narrowed(DType::kE5M2, kNaN), 0x7eu);
}

TEST(FloatsNarrowToNearestEven) {
  std::vector<float> values;
  const auto add = [&](uint32_t bits) { values.push_back(BitCast<float>(bits)); };
  for (uint64_t bits = 0; bits < 1ull << 32; bits += kSanitized ? 65521 : 4093) {
    add(static_cast<uint32_t>(bits));
  }
  // Ties and their neighbours of both formats, in every exponent.
  for (uint32_t upper = 0; upper < 1u << 13; ++upper) {
    for (const uint32_t lower : {0x0u, 0x1u, 0x7ffffu, 0x3ffffu, 0x40000u, 0x40001u}) {
      add(upper << 19 | lower);
    }
  }
  // And of their denormals.
  for (uint32_t unit = 0; unit < 64; ++unit) {
    for (const float size : {0x1p-10f, 0x1p-17f}) {
      for (const int step : {-1, 0, 1}) {
        add(BitCast<uint32_t>(static_cast<float>(unit) * size) + static_cast<uint32_t>(step));
      }
    }
  }
  const auto n = static_cast<int64_t>(values.size());
  for (const DType dtype : kBoth) {
    std::vector<unsigned char> many(values.size());
    RoundRow(dtype, reinterpret_cast<std::byte*>(many.data()), values.data(), n);
    int64_t wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t want = NearestOf8Bits(dtype, values[i]);
      wrong += Narrowed(dtype, values[i]) != want || many[i] != want;
    }
    CHECK_EQ(wrong, 0);
  }
}

// Blocks of all kinds; of `block` elements each.
std::vector<float> Blocks(int32_t block) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const float infinity = std::numeric_limits<float>::infinity();
  const float largest = std::numeric_limits<float>::max();
  const float tiny = std::numeric_limits<float>::denorm_min();
  std::vector<float> all;
  // Normally distributed elements times `factor`, with some of them replaced.
  const auto add = [&](float factor, const std::vector<float>& special = {}) {
    const size_t begin = all.size();
    for (int32_t i = 0; i < block; ++i) all.push_back(normal(random) * factor);
    for (const float value : special) all[begin + random() % static_cast<size_t>(block)] = value;
  };
  for (int exponent = -130; exponent <= 120; exponent += 10) add(std::ldexp(1.0f, exponent));
  add(0.0f);
  add(0.0f, {-0.0f, tiny, -tiny});
  add(0.0f, {std::numeric_limits<float>::min(), 1e-30f});
  add(0.0f, {std::nextafter(1e-30f, 1.0f)});
  add(1.0f, {largest});
  add(largest / 100, {-largest});
  add(1.0f, {infinity});
  add(1.0f, {-infinity, kNaN});
  add(0.0f, {kNaN});
  add(1.0f, {-kNaN});
  // Scales that are powers of two, and their neighbours.
  for (const float most : {448.0f, 448.0f * 0x1p-20f, 57344.0f, 57344.0f * 0x1p30f}) {
    add(most / 8, {most});
    add(most / 8, {std::nextafter(most, 0.0f)});
    add(most / 8, {-std::nextafter(most, infinity)});
  }
  // Many orders of magnitude in one block.
  add(1.0f);
  for (int32_t i = 0; i < block; ++i) all[all.size() - 1 - i] *= std::ldexp(1.0f, -i);
  return all;
}

TEST(QuantisedRows) {
  for (const DType dtype : kBoth) {
    for (const int32_t block : {32, 64, 128}) {
      for (const bool power_of_two : {false, true}) {
        const std::vector<float> x = Blocks(block);
        const auto width = static_cast<int32_t>(x.size());
        RowFormat format;
        format.quantisation = {dtype, block, power_of_two};
        format.Add(DType::kF32, 4, width);
        const Quantisation& how = format.quantisation;
        const Leaf& leaf = format.leaves[0];
        CHECK_EQ(format.stride, AlignUp(AlignUp(width, 16) + width / block * 4, 16));
        std::vector<std::byte> row(format.stride + 1, std::byte{0x5a});
        QuantiseRow(how, leaf, row.data(), x.data());
        CHECK(row.back() == std::byte{0x5a});
        std::vector<float> sums(width, 7.0f), twice(width);
        AddQuantisedRow(how, leaf, sums.data(), row.data(), /*first=*/true);
        twice = sums;
        AddQuantisedRow(how, leaf, twice.data(), row.data(), /*first=*/false);

        int64_t wrong = 0;
        for (int32_t b = 0; b < width / block; ++b) {
          const QuantisedBlock want(how, x.data() + b * block);
          float scale;
          std::memcpy(&scale, row.data() + leaf.scales_offset() + b * 4, 4);
          wrong += !Same(scale, want.scale);
          if (power_of_two && !std::isnan(scale)) {
            wrong += (BitCast<uint32_t>(scale) & 0x7fffff) != 0;
          }
          for (int32_t i = 0; i < block; ++i) {
            const auto value = static_cast<uint32_t>(row[b * block + i]);
            const bool nan = std::isnan(NumberOf(dtype, want.values[i]));
            wrong += nan ? !std::isnan(NumberOf(dtype, value)) : value != want.values[i];
            wrong += !Same(sums[b * block + i], want.Value(how, i));
            wrong += !Same(twice[b * block + i], want.Value(how, i) + want.Value(how, i));
          }
        }
        CHECK_EQ(wrong, 0);
      }
    }
  }
}

// No value is larger than the largest, and none is off by more than half a unit of its format.
TEST(QuantisedRowsAreClose) {
  for (const DType dtype : kBoth) {
    RowFormat format;
    format.quantisation = {dtype, 128, false};
    format.Add(DType::kF32, 4, 128);
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    std::vector<float> x(128), back(128);
    std::vector<std::byte> row(format.stride);
    for (int round = 0; round < 200; ++round) {
      float most = 0;
      for (float& value : x) most = std::max(most, std::abs(value = normal(random) * 1e-6f));
      QuantiseRow(format.quantisation, format.leaves[0], row.data(), x.data());
      AddQuantisedRow(format.quantisation, format.leaves[0], back.data(), row.data(), true);
      for (int i = 0; i < 128; ++i) {
        const float unit = dtype == DType::kE4M3 ? 0x1p-4f : 0x1p-3f;
        CHECK(std::abs(back[i] - x[i]) <= unit * 1.001f * std::abs(x[i]) + most * 0x1p-16f);
      }
    }
  }
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
