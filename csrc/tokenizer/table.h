// A tokenizer as one flat table of bytes, read where it lies (in a mapped image, for instance).
//
// mobilellm_fast/tokenizer/compiled.py writes it. All numbers are little-endian. A header of
// 32-bit words (`Word`) is followed by a directory of sections (`Section`: offset, bytes), then by
// the sections. Nothing in it is trusted: `Table` refuses whatever could lead a reader astray.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace mlf::tokenizer {

constexpr std::string_view kMagic = "MLFTOKEN";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kNone = 0xFFFFFFFF;  // no id; an empty slot of a hash table
constexpr uint32_t kMaxProbes = 1024;   // longest chain of a hash table
constexpr uint32_t kBlock = 128;        // code points per block of the character classes
constexpr uint32_t kCodePoints = 0x110000;

// What a text is made of before merging, and what decides about merges.
enum class Family : uint32_t {
  byte_level = 0,     // bytes; ranked merges of ids
  characters = 1,     // characters, unknown ones as bytes; ranked merges of ids
  sentencepiece = 2,  // characters, those left over at the end as bytes; pieces by their score
};
enum class Split : uint32_t { none = 0, gpt2 = 1, llama3 = 2, qwen2 = 3 };  // see words.h
enum class Prepend : uint32_t { never = 0, first = 1, always = 2 };         // a space, to a text

enum class Word : uint32_t {
  version,
  nbytes,
  family,
  split,
  cut_digits,            // every digit is a word of its own, before `split`
  whole_words,           // a word that is in the vocabulary is not merged
  prepend,               // first: to what begins the text; always: also after an added token
  prepend_unless_space,  // not to what begins with a space already
  decode_byte_runs,      // bytes spell characters only among themselves, all or none
  decode_strip_space,    // a decoded text loses its first space
  vocab_size,
  bos_id,
  unknown_id,
  longest_token,  // bytes of the longest in `lookup`
  count,
};

enum class Section : uint32_t {
  token_offsets,  // u32[vocab_size + 1] into token_bytes: what an id decodes to
  token_bytes,
  token_flags,   // u8[vocab_size], see below
  lookup,        // u32 slots by hash_bytes: ids that a text may become
  merges,        // Merge slots by hash_pair
  scores,        // f32[vocab_size], of sentencepiece; not NaN, no -0
  byte_ids,      // u32[256], kNone for bytes that are dropped
  added,         // Added[], in the order of (normalized, text)
  added_bytes,   // their texts
  class_blocks,  // u16[kCodePoints / kBlock]: block in `classes`
  classes,       // u8[kBlock] each, see below
  prefix,        // u32[]: ids around a text
  suffix,
  eos,  // u32[]
  count,
};

// token_flags
constexpr uint8_t kSpecial = 1;  // decoding may leave it out
constexpr uint8_t kByte = 2;     // stands for one byte

// classes
constexpr uint8_t kLetter = 1, kNumber = 2, kSpace = 4, kCutDigit = 8;

struct Merge {
  uint32_t left, right, rank, id;
};

// A token found in a text as it stands, before anything else.
struct Added {
  uint32_t id, offset, nbytes, flags;
};
constexpr uint32_t kLeftStrip = 1, kRightStrip = 2;  // it swallows the white space beside it
constexpr uint32_t kNormalized = 4;                  // looked for after normalization

inline uint64_t finish_hash(uint64_t h) { return h ^ (h >> 32); }
inline uint64_t hash_bytes(std::string_view bytes) {
  uint64_t h = 0xCBF29CE484222325ull;
  for (const char c : bytes) h = (h ^ static_cast<uint8_t>(c)) * 0x100000001B3ull;
  return finish_hash(h);
}
inline uint64_t hash_pair(uint32_t left, uint32_t right) {
  return finish_hash((uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15ull);
}

// Items of type T at any address.
template <class T>
class View {
 public:
  View() = default;
  View(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  size_t size() const { return size_; }
  T operator[](size_t i) const {
    T item;
    std::memcpy(&item, data_ + i * sizeof(T), sizeof(T));
    return item;
  }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// A checked table. Reads never leave it, whatever the bytes were when it was made.
class Table {
 public:
  // Throws std::invalid_argument. The bytes must outlive the table, and stay as they are.
  Table(const uint8_t* data, size_t nbytes);

  uint32_t word(Word w) const { return words_[static_cast<size_t>(w)]; }
  bool flag(Word w) const { return word(w) != 0; }
  Family family() const { return static_cast<Family>(word(Word::family)); }
  Split split() const { return static_cast<Split>(word(Word::split)); }
  Prepend prepend() const { return static_cast<Prepend>(word(Word::prepend)); }
  uint32_t vocab_size() const { return word(Word::vocab_size); }

  std::string_view token(uint32_t id) const {  // id < vocab_size
    const uint32_t begin = token_offsets_[id];
    return token_bytes_.substr(begin, token_offsets_[id + 1] - begin);
  }
  uint8_t token_flags(uint32_t id) const { return token_flags_[id]; }
  float score(uint32_t id) const { return scores_[id]; }
  uint32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }
  uint8_t character_class(uint32_t code) const {  // code < kCodePoints
    return classes_[size_t{class_blocks_[code / kBlock]} * kBlock + code % kBlock];
  }
  // The id of the token that a text may become, or kNone.
  uint32_t find(std::string_view bytes) const;
  // Rank and id of a merge; false if there is none.
  bool find_merge(uint32_t left, uint32_t right, Merge& merge) const;

  View<Added> added() const { return added_; }
  std::string_view added_text(const Added& token) const {
    return added_bytes_.substr(token.offset, token.nbytes);
  }
  View<uint32_t> prefix() const { return prefix_; }
  View<uint32_t> suffix() const { return suffix_; }
  View<uint32_t> eos() const { return eos_; }

 private:
  void check_words() const;
  void check_tokens() const;
  void check_hash_tables() const;
  void check_added() const;

  std::array<uint32_t, static_cast<size_t>(Word::count)> words_{};
  View<uint32_t> token_offsets_, lookup_, byte_ids_, prefix_, suffix_, eos_;
  View<uint8_t> token_flags_, classes_;
  View<uint16_t> class_blocks_;
  View<float> scores_;
  View<Merge> merges_;
  View<Added> added_;
  std::string_view token_bytes_, added_bytes_;
};

}  // namespace mlf::tokenizer
