// Byte-pair encoding: joins neighbours, the best pair first, until no pair joins.
#pragma once

#include <string_view>
#include <vector>

#include "table.h"

namespace mlf::tokenizer {

// Merges one word after another in memory of its own: n log n steps for a word of n symbols.
class Merger {
 public:
  explicit Merger(const Table& table) : table_(table) {}

  // Append the ids of a word (below 2 GB) to `ids`.
  void encode(std::string_view word, std::vector<int32_t>& ids);

 private:
  struct Symbol {
    uint32_t id, begin, nbytes;  // id: kNone for a character that is no token; nbytes 0: merged
    int32_t previous, next;      // -1 at the ends
  };
  struct Candidate {
    uint64_t order;  // priority, then place: the smallest goes first
    uint32_t left, id;
  };

  void add_symbol(uint32_t id, size_t begin, size_t nbytes);
  void add_symbols(std::string_view word);
  bool find(std::string_view word, int32_t left, Candidate& found) const;
  void consider(std::string_view word, int32_t left);
  void merge_all(std::string_view word);

  const Table& table_;
  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
};

}  // namespace mlf::tokenizer
