#include "merging.h"

#include <algorithm>

#include "utf8.h"

namespace mlf::tokenizer {
namespace {

// A score as a number that is smaller for higher scores.
uint32_t priority_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

}  // namespace

void Merger::encode(std::string_view word, std::vector<int32_t>& ids) {
  if (table_.flag(Word::whole_words)) {
    const uint32_t id = table_.find(word);
    if (id != kNone) {
      ids.push_back(static_cast<int32_t>(id));
      return;
    }
  }
  symbols_.clear();
  add_symbols(word);
  if (symbols_.empty()) return;
  merge_all(word);
  for (int32_t at = 0; at >= 0; at = symbols_[at].next) {
    const Symbol& symbol = symbols_[at];
    if (symbol.id != kNone) {
      ids.push_back(static_cast<int32_t>(symbol.id));
      continue;
    }
    for (const char byte : word.substr(symbol.begin, symbol.nbytes))
      ids.push_back(static_cast<int32_t>(table_.byte_id(static_cast<uint8_t>(byte))));
  }
}

void Merger::add_symbol(uint32_t id, size_t begin, size_t nbytes) {
  const int32_t at = static_cast<int32_t>(symbols_.size());
  if (at) symbols_.back().next = at;
  symbols_.push_back({id, static_cast<uint32_t>(begin), static_cast<uint32_t>(nbytes), at - 1, -1});
}

void Merger::add_symbols(std::string_view word) {
  const auto add_bytes = [&](size_t begin, size_t nbytes) {
    for (size_t at = begin; at < begin + nbytes; ++at) {
      const uint32_t id = table_.byte_id(static_cast<uint8_t>(word[at]));
      if (id != kNone) add_symbol(id, at, 1);
    }
  };
  if (table_.family() == Family::byte_level) return add_bytes(0, word.size());
  for (size_t at = 0; at < word.size();) {
    const size_t nbytes = character_at(word, at).nbytes;
    const uint32_t id = table_.find(word.substr(at, nbytes));
    if (id == kNone && table_.family() == Family::characters) add_bytes(at, nbytes);
    else add_symbol(id, at, nbytes);
    at += nbytes;
  }
}

// What `left` and its neighbour join to, if they do.
bool Merger::find(std::string_view word, int32_t left, Candidate& found) const {
  const Symbol &a = symbols_[left], &b = symbols_[a.next];
  uint32_t priority;
  if (table_.family() == Family::sentencepiece) {
    found.id = table_.find(word.substr(a.begin, a.nbytes + b.nbytes));
    if (found.id == kNone) return false;
    priority = priority_of(table_.score(found.id));
  } else {
    Merge merge;
    if (!table_.find_merge(a.id, b.id, merge)) return false;
    found.id = merge.id;
    priority = merge.rank;
  }
  found.left = static_cast<uint32_t>(left);
  found.order = uint64_t{priority} << 32 | found.left;
  return true;
}

void Merger::consider(std::string_view word, int32_t left) {
  Candidate candidate;
  if (left < 0 || symbols_[left].next < 0 || !find(word, left, candidate)) return;
  heap_.push_back(candidate);
  std::push_heap(heap_.begin(), heap_.end(),
                 [](const Candidate& a, const Candidate& b) { return a.order > b.order; });
}

void Merger::merge_all(std::string_view word) {
  const auto later = [](const Candidate& a, const Candidate& b) { return a.order > b.order; };
  heap_.clear();
  for (int32_t left = 0; left + 1 < static_cast<int32_t>(symbols_.size()); ++left) {
    Candidate candidate;
    if (find(word, left, candidate)) heap_.push_back(candidate);
  }
  std::make_heap(heap_.begin(), heap_.end(), later);
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    const Candidate best = heap_.back();
    heap_.pop_back();
    const int32_t at = static_cast<int32_t>(best.left);
    Symbol& left = symbols_[at];
    if (left.nbytes == 0 || left.next < 0) continue;
    // The pair that was meant may be gone. Like the library we ask only whether the pair that is
    // there now makes the same token.
    Candidate now;
    if (!find(word, at, now) || now.id != best.id) continue;
    Symbol& right = symbols_[left.next];
    left.id = best.id;
    left.nbytes += right.nbytes;
    left.next = right.next;
    right.nbytes = 0;
    if (left.next >= 0) symbols_[left.next].previous = at;
    consider(word, left.previous);
    consider(word, at);
  }
}

}  // namespace mlf::tokenizer
