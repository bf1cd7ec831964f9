#include "table.h"

#include <stdexcept>
#include <string>

namespace mlf::tokenizer {
namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("tokenizer table: ") + what);
}

bool is_power_of_two(size_t n) { return n && !(n & (n - 1)); }

constexpr size_t kWords = static_cast<size_t>(Word::count);
constexpr size_t kSections = static_cast<size_t>(Section::count);
constexpr size_t kDirectory = kMagic.size() + 4 * kWords;
constexpr size_t kHeader = kDirectory + 8 * kSections;

}  // namespace

Table::Table(const uint8_t* data, size_t nbytes) {
  require(nbytes >= kHeader && nbytes < kNone, "too short or too long");
  require(std::memcmp(data, kMagic.data(), kMagic.size()) == 0, "not a tokenizer table");
  std::memcpy(words_.data(), data + kMagic.size(), sizeof words_);
  require(word(Word::version) == kVersion, "of another version");
  require(word(Word::nbytes) == nbytes, "not whole");

  const auto bytes_of = [&](Section section) {
    uint32_t place[2];
    std::memcpy(place, data + kDirectory + 8 * static_cast<size_t>(section), sizeof place);
    require(place[0] <= nbytes && place[1] <= nbytes - place[0], "a section lies outside");
    return std::string_view(reinterpret_cast<const char*>(data) + place[0], place[1]);
  };
  const auto read = [&](Section section, auto& view) {
    using Item = std::decay_t<decltype(view[0])>;
    const std::string_view bytes = bytes_of(section);
    require(bytes.size() % sizeof(Item) == 0, "a section ends inside an item");
    view = {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size() / sizeof(Item)};
  };
  read(Section::token_offsets, token_offsets_);
  token_bytes_ = bytes_of(Section::token_bytes);
  read(Section::token_flags, token_flags_);
  read(Section::lookup, lookup_);
  read(Section::merges, merges_);
  read(Section::scores, scores_);
  read(Section::byte_ids, byte_ids_);
  read(Section::added, added_);
  added_bytes_ = bytes_of(Section::added_bytes);
  read(Section::class_blocks, class_blocks_);
  read(Section::classes, classes_);
  read(Section::prefix, prefix_);
  read(Section::suffix, suffix_);
  read(Section::eos, eos_);

  check_words();
  check_tokens();
  check_hash_tables();
  check_added();
}

void Table::check_words() const {
  require(word(Word::family) <= static_cast<uint32_t>(Family::sentencepiece), "unknown family");
  require(word(Word::split) <= static_cast<uint32_t>(Split::qwen2), "unknown way to cut words");
  require(word(Word::prepend) <= static_cast<uint32_t>(Prepend::always), "unknown space rule");
  require(vocab_size() <= (1u << 30), "too many ids");
  for (const View<uint32_t>& ids : {prefix_, suffix_})
    for (size_t i = 0; i < ids.size(); ++i)
      require(ids[i] < vocab_size(), "an id beyond the vocabulary");
}

void Table::check_tokens() const {
  const uint32_t count = vocab_size();
  require(token_offsets_.size() == size_t{count} + 1, "offsets must fit the vocabulary");
  require(token_flags_.size() == count, "flags must fit the vocabulary");
  for (uint32_t id = 0; id < count; ++id)
    require(token_offsets_[id] <= token_offsets_[id + 1], "offsets must not fall");
  require(token_offsets_[count] <= token_bytes_.size(), "a token lies outside");

  const bool scored = family() == Family::sentencepiece;
  require(scores_.size() == (scored ? count : 0), "scores must fit the family");
  for (size_t id = 0; id < scores_.size(); ++id)
    require(scores_[id] == scores_[id], "a score is not a number");

  require(byte_ids_.size() == 256, "there must be an id for each byte");
  for (size_t byte = 0; byte < 256; ++byte) {
    const bool dropped = byte_ids_[byte] == kNone && family() == Family::byte_level;
    require(dropped || byte_ids_[byte] < count, "a byte has no id");
  }
  require(class_blocks_.size() == kCodePoints / kBlock, "classes must cover Unicode");
  for (size_t i = 0; i < class_blocks_.size(); ++i)
    require((size_t{class_blocks_[i]} + 1) * kBlock <= classes_.size(), "a class lies outside");
}

void Table::check_hash_tables() const {
  require(is_power_of_two(lookup_.size()), "slots must be a power of two");
  for (size_t slot = 0; slot < lookup_.size(); ++slot)
    require(lookup_[slot] < vocab_size() || lookup_[slot] == kNone, "a slot names no token");
  require(is_power_of_two(merges_.size()), "slots must be a power of two");
  for (size_t slot = 0; slot < merges_.size(); ++slot) {
    const Merge merge = merges_[slot];
    require(merge.left == kNone || merge.id < vocab_size(), "a merge makes no token");
  }
}

void Table::check_added() const {
  for (size_t i = 0; i < added_.size(); ++i) {
    const Added token = added_[i];
    require(token.id < vocab_size(), "an added token has no id");
    require(token.offset <= added_bytes_.size() &&
                token.nbytes <= added_bytes_.size() - token.offset && token.nbytes > 0,
            "an added token lies outside");
    if (i == 0) continue;
    const Added before = added_[i - 1];  // the search for them relies on their order
    const uint32_t phase = token.flags & kNormalized, earlier = before.flags & kNormalized;
    require(earlier < phase || (earlier == phase && added_text(before) < added_text(token)),
            "added tokens must be sorted");
  }
}

uint32_t Table::find(std::string_view bytes) const {
  if (bytes.size() > word(Word::longest_token)) return kNone;
  const size_t mask = lookup_.size() - 1;
  size_t slot = hash_bytes(bytes) & mask;
  for (uint32_t probe = 0; probe < kMaxProbes; ++probe, slot = (slot + 1) & mask) {
    const uint32_t id = lookup_[slot];
    if (id == kNone || token(id) == bytes) return id;
  }
  return kNone;
}

bool Table::find_merge(uint32_t left, uint32_t right, Merge& merge) const {
  const size_t mask = merges_.size() - 1;
  size_t slot = hash_pair(left, right) & mask;
  for (uint32_t probe = 0; probe < kMaxProbes; ++probe, slot = (slot + 1) & mask) {
    merge = merges_[slot];
    if (merge.left == kNone) return false;
    if (merge.left == left && merge.right == right) return true;
  }
  return false;
}

}  // namespace mlf::tokenizer
