// What attention fetches ahead: the bytes that it reads later, and no others.
#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "kernels.h"

namespace mlf {
namespace {

std::vector<const uint8_t*> fetched;

#define MLF_UNROLL
#define __builtin_prefetch(line, ...) fetched.push_back(line)
#include "kernels/page_ahead.h"
#undef __builtin_prefetch

int failures = 0;

using Bytes = std::vector<const uint8_t*>;  // in the order of reading

void append(Bytes& bytes, const void* begin, int64_t count) {
  const auto* at = static_cast<const uint8_t*>(begin);
  for (int64_t i = 0; i < count; ++i) bytes.push_back(at + i);
}

// As attention to so many tokens reads a page, by the layout that kernels.h describes.
Bytes read(const PageView& page, int tokens) {
  const int64_t size = page.element_nbytes(), dim = page.head_dim;
  const bool coded = is_coded(page.kind);
  const int in_step = coded ? static_cast<int>(4 / size) : 1;  // inputs of keys, tokens of values
  const int64_t steps = ceil_div(dim, in_step);
  Bytes bytes;
  if (coded) append(bytes, page.key_scales(), 4 * kPageTokens);
  for (int tile = 0; 16 * tile < tokens; ++tile)
    append(bytes, page.keys() + tile * steps * in_step * 16 * size, steps * in_step * 16 * size);
  if (!coded) {
    for (int token = 0; token < tokens; ++token)
      append(bytes, page.values() + token * page.padded_dim() * size, page.padded_dim() * size);
    return bytes;
  }
  append(bytes, page.value_scales(), 4 * kPageTokens);
  for (int64_t output = 0; output < page.padded_dim(); output += 16)
    for (int token = 0; token < tokens; token += in_step)
      append(bytes, page.values() + (output * kPageTokens + token * 16) * size, kStepBytes);
  return bytes;
}

void expect(const Bytes& bytes, KVKind kind, int dim, const PageAhead& ahead) {
  std::vector<const uint8_t*> lines = fetched;
  std::sort(lines.begin(), lines.end());
  // Every byte lies in a line, and a line has some of the bytes.
  std::vector<char> of_use(lines.size());
  int64_t missed = 0;
  for (const uint8_t* byte : bytes) {
    const auto behind = std::upper_bound(lines.begin(), lines.end(), byte);
    if (behind == lines.begin() || byte - behind[-1] >= kStepBytes) ++missed;
    else of_use[behind - lines.begin() - 1] = 1;
  }
  const auto wasted = std::count(of_use.begin(), of_use.end(), 0);
  const bool twice = std::adjacent_find(lines.begin(), lines.end()) != lines.end();
  if (!missed && !wasted && !twice) return;
  ++failures;
  std::fprintf(
      stderr, "%s, heads of %d, %d and %d tokens, %d bytes ahead: %d missed, %d wasted%s\n",
      name_of(kind), dim, ahead.tokens, ahead.next_tokens, static_cast<int>(ahead.distance),
      static_cast<int>(missed), static_cast<int>(wasted), twice ? ", some twice" : "");
}

void fetch_all(const PageView& page) {
  fetched.clear();
  AheadOfPage ahead(page);
  while (ahead.fetch<1>()) {
  }
  if (ahead.fetch<1>()) ++failures;  // nothing comes after the end
}

void check(KVKind kind, int dim, int tokens, int next_tokens) {
  PageView page{nullptr, kind, dim};
  std::vector<uint8_t> memory(2 * page.nbytes() + 64);
  page.data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  PageView next = page;
  next.data += page.nbytes();
  const Bytes own = read(page, tokens), there = read(next, next_tokens);
  for (const int64_t distance : {int64_t{64}, int64_t{4096}, int64_t{12} << 10, page.nbytes()}) {
    page.ahead = {distance, tokens, next.data, next_tokens};
    fetch_all(page);
    Bytes bytes(own.begin() + std::min<int64_t>(distance, own.size()), own.end());
    bytes.insert(bytes.end(), there.begin(),
                 there.begin() + std::min<int64_t>(distance, there.size()));
    expect(bytes, kind, dim, page.ahead);
    page.ahead.next = nullptr;
    fetch_all(page);
    bytes.assign(own.begin() + std::min<int64_t>(distance, own.size()), own.end());
    expect(bytes, kind, dim, page.ahead);
  }
  page.ahead = {};
  fetch_all(page);
  expect({}, kind, dim, page.ahead);
}

}  // namespace
}  // namespace mlf

int main() {
  using namespace mlf;
  for (const KVKind kind : {KVKind::fp32, KVKind::fp16, KVKind::int16, KVKind::int8})
    for (const int dim : {16, 64, 80})
      for (const int tokens : {1, 16, 17, 127, kPageTokens})
        for (const int next_tokens : {1, 50, kPageTokens}) check(kind, dim, tokens, next_tokens);
  return failures ? 1 : 0;
}
