// SPDX-License-Identifier: Apache-2.0
//
// The whole test framework: TEST(Name) { CHECK(condition); CHECK_EQ(got, expected); } and one
// TEST_MAIN() per program. A failed check prints where, the expression and the values, and the test
// goes on; the exit code is then 1. Checks may run on any thread.
#ifndef SMFREE_TESTS_CPP_CHECK_H_
#define SMFREE_TESTS_CPP_CHECK_H_

#include <atomic>
#include <cstdio>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {
struct Test { const char* name; void (*body)(); };
inline std::vector<Test> tests;
inline std::atomic<int> checks{0}, failures{0};
inline bool Add(const char* name, void (*body)()) { return tests.push_back({name, body}), true; }

template <typename T>
std::string Show(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_enum_v<T>) out << static_cast<long long>(value);
  else out << std::boolalpha << value;
  return out.str();
}

inline void Report(bool ok, const char* file, int line, const char* text) {
  ++checks;
  if (!ok && ++failures <= 20) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}
template <typename A, typename B>
void Equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b) return Report(true, file, line, text);
  Report(false, file, line, (text + (": " + Show(a)) + " vs " + Show(b)).c_str());
}

inline int RunAll() {
  for (const Test& test : tests) {
    std::printf("%s\n", test.name);
    test.body();
  }
  std::printf("%zu tests, %d checks, %d failed\n", tests.size(), checks.load(), failures.load());
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                                              \
  static void name();                                                                           \
  [[maybe_unused]] static const bool name##_registered = check::Add(#name, name);               \
  static void name()
#define CHECK(condition) check::Report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) check::Equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define TEST_MAIN() int main() { return check::RunAll(); }

#endif  // SMFREE_TESTS_CPP_CHECK_H_
