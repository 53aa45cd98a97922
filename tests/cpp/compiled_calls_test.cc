// SPDX-License-Identifier: Apache-2.0
//
// Names of compiled calls: equal wherever the same program is compiled, whatever else is.
#include "csrc/cpu/exchange/compiled_calls.h"

#include <functional>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/protocol/token.h"
#include "tests/cpp/check.h"

namespace smfree::cpu {
namespace {

using Calls = std::vector<std::unique_ptr<CompiledCall>>;

void Create(Calls& calls, uint32_t call_site, int32_t lane = 0) {
  CallAttributes attributes;
  attributes.call_site = call_site;
  attributes.lane = lane;
  calls.push_back(std::make_unique<CompiledCall>(attributes));
}

// A layer that is called three times, among other calls.
void CreateProgram(Calls& calls) {
  for (const uint32_t call_site : {1, 2, 1, 3, 1}) Create(calls, call_site);
}

void OnAThread(const std::function<void()>& body) { std::thread(body).join(); }

Calls Compile(const std::function<void(Calls&)>& create, bool on_the_waiting_thread = true) {
  Calls calls;
  CompilationBegins();
  if (on_the_waiting_thread) {
    create(calls);
  } else {
    OnAThread([&] { create(calls); });
  }
  CompilationEnds();
  return calls;
}

void CheckNames(const Calls& calls) {
  CHECK_EQ(calls[0]->instance().ordinal, 0u);
  CHECK_EQ(calls[2]->instance().ordinal, 1u);
  CHECK_EQ(calls[4]->instance().ordinal, 2u);
  CHECK(calls[1]->instance() == Instance{} && calls[3]->instance() == Instance{});
  const Calls alone = Compile(CreateProgram);
  for (size_t i = 0; i < calls.size(); ++i) {
    CHECK(calls[i]->instance() == alone[i]->instance());
    CHECK_EQ(calls[i]->Sequence(7), alone[i]->Sequence(7));
  }
}

TEST(AlikeCallsAreCountedPerProgram) {
  const Calls first = Compile(CreateProgram), second = Compile(CreateProgram);
  CheckNames(first);
  CheckNames(second);
  CHECK(first[0]->instance().program > 0 && first[0]->instance().program < Token::kExact);
}

TEST(ProgramsThatDifferHaveOtherNames) {
  const Calls program = Compile(CreateProgram);
  const Calls longer = Compile([](Calls& calls) {
    CreateProgram(calls);
    Create(calls, 4);
  });
  CHECK(program[0]->instance().program != longer[0]->instance().program);
  CHECK(longer[1]->instance() == Instance{});  // where nothing is alike, nothing else counts
}

TEST(ThreadsOfAPoolCreateThePrograms) {
  Calls first = Compile(CreateProgram, false), second = Compile(CreateProgram, false);
  CheckNames(first);
  CheckNames(second);
}

TEST(ACompilationThatFails) {
  Compile(CreateProgram).clear();
  Calls calls;
  CompilationBegins();
  CreateProgram(calls);
  calls.clear();  // and is tried again
  CreateProgram(calls);
  CompilationEnds();
  CheckNames(calls);
}

TEST(CompilationsOfOtherThreads) {
  for (const bool on_the_waiting_thread : {true, false}) {
    const Calls calls = Compile(
        [&](Calls& mine) {
          Create(mine, 1);
          OnAThread([] { Compile([](Calls&) {}); });
          Create(mine, 2);
          if (on_the_waiting_thread) OnAThread([] { Compile(CreateProgram); });
          Create(mine, 1);
          OnAThread([&] { Compile(CreateProgram, on_the_waiting_thread); });
          Create(mine, 3);
          Create(mine, 1);
        },
        on_the_waiting_thread);
    CheckNames(calls);
  }
}

TEST(WithoutAWordAboutCompilationsAProgramEndsWhenItRuns) {
  for (int i = 0; i < 2; ++i) {
    Calls calls;
    CreateProgram(calls);
    CheckNames(calls);
  }
}

TEST(SequencesHaveNamesOfTheirOwn) {
  const Calls calls = Compile(CreateProgram);
  std::set<uint64_t> names;
  for (int64_t run = 0; run < 1000; ++run) {
    for (const auto& call : calls) names.insert(call->Sequence(run));
  }
  CHECK_EQ(names.size(), 5000u);
  CHECK(*names.begin() > 0 && *names.rbegin() < uint64_t{Token::kLimit});
}

TEST(ATokenCarriesNames) {
  const Token token{1.0f, Token::kLimit - 1, 12345678901, {5, Token::kExact - 1}, Token::kLimit - 2};
  float array[Token::kSize];
  token.Write(array);
  const Token read = Token::Read(array);
  CHECK_EQ(read.number, token.number);
  CHECK_EQ(read.run_id, token.run_id);
  CHECK(read.instance == token.instance);
  CHECK_EQ(read.sequence, token.sequence);
}

}  // namespace
}  // namespace smfree::cpu

TEST_MAIN()
