#include "image.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "../checksum.h"
#include "json.h"

namespace mlf::image {
namespace {

constexpr uint32_t kVersion = 3;  // VERSION in image.py
constexpr int64_t kPrefixBytes = 24, kLine = 64, kPage = 1 << 16;
constexpr int64_t kMaxInteger = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxRepeats = 64;  // MAX_LAYER_REPEATS in config.py
constexpr double kMaxFactor = 1024;  // MAX_ROPE_FACTOR
constexpr int64_t kAlignment = 64;   // of tensors, ALIGNMENT in quant.py
constexpr int64_t kMaxTokenCols = (int64_t{1} << 31) / (128 * kMaxCode);  // one sum fits int32

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

// The field of an object; refuses one that is missing or of another type.
const Json& field(const Json& object, const char* name) {
  const Json* found = object.find(name);
  if (!found) refuse(std::string("the header is damaged (") + name + " is missing)");
  return *found;
}
template <class T>
const T& field_as(const Json& object, const char* name) {
  const T* value = field(object, name).as<T>();
  if (!value) refuse(std::string("the header is damaged (") + name + " is of another type)");
  return *value;
}
int64_t integer(const Json& object, const char* name, int64_t least, int64_t most = kMaxInteger) {
  const int64_t value = field_as<int64_t>(object, name);
  if (value < least || value > most)
    refuse(std::string(name) + " must be in " + std::to_string(least) + ".." +
           std::to_string(most) + ", got " + std::to_string(value));
  return value;
}
double number(const Json& object, const char* name, double least, double most) {
  const Json& json = field(object, name);
  const double* real = json.as<double>();
  const int64_t* whole = json.as<int64_t>();
  const double value = real ? *real : whole ? static_cast<double>(*whole) : NAN;
  if (!(value >= least && value <= most)) refuse(std::string(name) + " is out of range");
  return value;
}
uint64_t checksum_field(const Json& object, const char* name) {
  const Json& json = field(object, name);
  if (const uint64_t* large = json.as<uint64_t>()) return *large;
  return static_cast<uint64_t>(field_as<int64_t>(object, name));
}

void check(const uint8_t* data, int64_t nbytes, uint64_t expected, int threads, const char* part) {
#if defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION)
  static_cast<void>(checksum(data, nbytes, threads));  // a fuzzer would never get beyond
  static_cast<void>(expected);
  static_cast<void>(part);
#else
  if (checksum(data, nbytes, threads) != expected) refuse(std::string("the ") + part + " damaged");
#endif
}

template <class T>
T read_at(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

struct Shape {
  int64_t hidden, intermediate, vocab, layers, heads, kv_heads, head_dim;
  bool tied;

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

Shape read_shape(const Json& config) {
  for (const char* name : {"attention_bias", "mlp_bias"})
    if (field_as<bool>(config, name)) refuse(std::string(name) + " is not supported");
  if (field_as<std::string>(config, "hidden_act") != "silu") refuse("hidden_act must be silu");
  Shape s{};
  s.hidden = integer(config, "hidden_size", 1, kMaxCols);
  s.intermediate = integer(config, "intermediate_size", 1, kMaxCols);
  s.vocab = integer(config, "vocab_size", 1);
  s.layers = integer(config, "num_hidden_layers", 1);
  s.heads = integer(config, "num_attention_heads", 1, kMaxCols);
  s.kv_heads = integer(config, "num_key_value_heads", 1, s.heads);
  s.head_dim = integer(config, "head_dim", 2, kMaxCols);
  s.tied = field_as<bool>(config, "tie_word_embeddings");
  if (s.heads % s.kv_heads || s.head_dim % 2)
    refuse("heads must be a multiple of KV heads, and head_dim even");
  if (s.q_size() > kMaxCols) refuse("the attention heads together are too wide");
  return s;
}

Rope read_rope(const Json& config, const Shape& shape) {
  Rope rope;
  rope.head_dim = shape.head_dim;
  rope.trained_length = integer(config, "max_position_embeddings", 1);
  rope.theta = number(config, "rope_theta", 1e-30, 3e38);
  const Json& scaling = field(config, "rope_scaling");
  if (scaling.is_null()) return rope;
  const std::string& type = field_as<std::string>(scaling, "rope_type");
  rope.factor = number(scaling, "factor", 1, kMaxFactor);
  if (type == "linear") {
    rope.scaling = Rope::Scaling::linear;
  } else if (type == "dynamic" && shape.head_dim >= 4) {
    rope.scaling = Rope::Scaling::dynamic;
  } else if (type == "llama3") {
    rope.scaling = Rope::Scaling::llama3;
    rope.low_freq_factor = number(scaling, "low_freq_factor", 1e-30, 3e38);
    rope.high_freq_factor = number(scaling, "high_freq_factor", 1e-30, 3e38);
    rope.original_length = integer(scaling, "original_max_position_embeddings", 1);
    if (rope.high_freq_factor <= rope.low_freq_factor)
      refuse("high_freq_factor must exceed low_freq_factor");
  } else {
    refuse("rope_scaling of this type is not supported");
  }
  return rope;
}

std::vector<int> read_schedule(const Json& config, int64_t layers) {
  const Json& sharing = field(config, "layer_sharing");
  std::vector<int> schedule;
  const auto add = [&](int64_t block) { schedule.push_back(static_cast<int>(block)); };
  const int64_t repeats = integer(config, "layer_repeats", 1, kMaxRepeats);
  const std::string* kind = sharing.as<std::string>();
  if (const bool* shared = sharing.as<bool>(); shared && !*shared) {
    for (int64_t block = 0; block < layers; ++block) add(block);
  } else if (kind && *kind == "immediate") {
    for (int64_t block = 0; block < layers; ++block)
      for (int64_t i = 0; i < repeats; ++i) add(block);
  } else if (kind && (*kind == "repeat_all" || *kind == "reverse")) {
    for (int64_t i = 0; i < repeats; ++i)
      for (int64_t block = 0; block < layers; ++block)
        add(*kind == "reverse" && i % 2 ? layers - 1 - block : block);
  } else {
    refuse("layer_sharing of this kind is not supported");
  }
  return schedule;
}

// Hands out tensors in the order in which plan_slots of weights.py lays them out.
class Tensors {
 public:
  Tensors(const uint8_t* data, int64_t nbytes, const Json& header)
      : data_(data), nbytes_(nbytes), kinds_(field(header, "kinds")) {
    format_ = field_as<std::string>(header, "format");
    if (format_ == "fp32" || format_ == "bf16") activation_ = ActivationKind::floating;
    else if (format_ == "w8a8") activation_ = ActivationKind::int8;
    else if (format_ == "int8" || format_ == "int4" || format_ == "int4_all")
      activation_ = ActivationKind::int8_g32;
    else refuse("unknown format");
  }

  ActivationKind activation() const { return activation_; }
  size_t count() const { return field_count(); }
  int64_t end() const { return end_; }

  const float* vector(int64_t size) { return reinterpret_cast<const float*>(take(4 * size)); }
  Weight matrix(const std::string& name, int64_t rows, int64_t cols) {
    const std::string& kind_name = field_as<std::string>(kinds_, name.c_str());
    const WeightKind kind = allowed_kind(kind_name);
    if (activation_ == ActivationKind::int8 && cols > kMaxTokenCols)
      refuse(name + " has too many columns for w8a8");
    const Weight weight{kind, rows, cols, nullptr};
    return {kind, rows, cols, take(weight.nbytes())};
  }

 private:
  size_t field_count() const {
    const Json::Object* members = kinds_.as<Json::Object>();
    return members ? members->size() : 0;
  }
  WeightKind allowed_kind(const std::string& name) const {
    if (name == format_ && name == "fp32") return WeightKind::fp32;
    if (name == format_ && name == "bf16") return WeightKind::bf16;
    const bool eight = format_ == "int8" || format_ == "w8a8" || format_ == "int4";
    if (name == "int8" && eight) return WeightKind::int8;
    if (name == "int8_g32" && (format_ == "int8" || format_ == "int4")) return WeightKind::int8_g32;
    const bool four = format_ == "int4" || format_ == "int4_all";
    if (name == "int4_g32" && four) return WeightKind::int4_g32;
    if (name == "int4_sym_g32" && four) return WeightKind::int4_sym_g32;
    refuse("a tensor has a kind that the format " + format_ + " does not allow");
  }
  const uint8_t* take(int64_t nbytes) {
    const uint8_t* at = data_ + offset_;
    if (nbytes > nbytes_ - offset_) refuse("tensors and their sizes disagree");
    end_ = offset_ + nbytes;
    offset_ = std::min(round_up(end_, kAlignment), nbytes_);
    return at;
  }

  const uint8_t* data_;
  const int64_t nbytes_;
  int64_t offset_ = 0, end_ = 0;
  const Json& kinds_;
  std::string format_;
  ActivationKind activation_;
};

Model read_model(const Json& config, const Shape& shape, Tensors& tensors) {
  Model model{};
  model.hidden = shape.hidden;
  model.intermediate = shape.intermediate;
  model.vocab = shape.vocab;
  model.heads = static_cast<int>(shape.heads);
  model.kv_heads = static_cast<int>(shape.kv_heads);
  model.head_dim = static_cast<int>(shape.head_dim);
  model.norm_eps = static_cast<float>(number(config, "rms_norm_eps", 0, 3e38));
  model.activation = tensors.activation();
  model.kv_kind = model.activation == ActivationKind::floating ? KVKind::fp32 : KVKind::int16;
  model.embedding = tensors.matrix("model.embed_tokens.weight", shape.vocab, shape.hidden);
  for (int64_t i = 0; i < shape.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto matrix = [&](const char* name, int64_t rows, int64_t cols) {
      return tensors.matrix(prefix + name + "_proj.weight", rows, cols);
    };
    BlockWeights block{};
    block.attention_norm = tensors.vector(shape.hidden);
    block.q = matrix("self_attn.q", shape.q_size(), shape.hidden);
    block.k = matrix("self_attn.k", shape.kv_size(), shape.hidden);
    block.v = matrix("self_attn.v", shape.kv_size(), shape.hidden);
    block.o = matrix("self_attn.o", shape.hidden, shape.q_size());
    block.ffn_norm = tensors.vector(shape.hidden);
    block.gate = matrix("mlp.gate", shape.intermediate, shape.hidden);
    block.up = matrix("mlp.up", shape.intermediate, shape.hidden);
    block.down = matrix("mlp.down", shape.hidden, shape.intermediate);
    model.blocks.push_back(block);
  }
  model.final_norm = tensors.vector(shape.hidden);
  model.head =
      shape.tied ? model.embedding : tensors.matrix("lm_head.weight", shape.vocab, shape.hidden);
  return model;
}

void add_end_ids(const Json& config, std::vector<int32_t>& ids) {
  const auto add = [&](const Json& json) {
    const int64_t* id = json.as<int64_t>();
    if (!id || *id < 0 || *id > kMaxInteger) refuse("eos_token_id is no token");
    ids.push_back(static_cast<int32_t>(*id));
  };
  const Json& eos = field(config, "eos_token_id");
  if (const Json::Array* several = eos.as<Json::Array>())
    for (const Json& id : *several) add(id);
  else if (!eos.is_null()) add(eos);
}

}  // namespace

Image read_image(const uint8_t* data, int64_t nbytes, int threads) {
  if (nbytes < kPrefixBytes || std::memcmp(data, kMagic.data(), kMagic.size()) != 0)
    refuse("is not a packed image");
  const uint32_t version = read_at<uint32_t>(data + 8);
  if (version != kVersion)
    refuse("must have image version " + std::to_string(kVersion) + ", got " +
           std::to_string(version) + "; pack the model again");
  const int64_t header_nbytes = read_at<uint32_t>(data + 12);
  if (header_nbytes > nbytes - kPrefixBytes) refuse("the header is damaged");
  const uint8_t* header_data = data + kPrefixBytes;
  check(header_data, header_nbytes, read_at<uint64_t>(data + 16), 1, "header is");

  Json header;
  try {
    header = Json::parse(
        {reinterpret_cast<const char*>(header_data), static_cast<size_t>(header_nbytes)});
  } catch (const std::invalid_argument&) {
    refuse("the header is damaged");
  }
  const int64_t table_begin = round_up(kPrefixBytes + header_nbytes, kLine);
  const int64_t table_nbytes = integer(header, "tokenizer_nbytes", 0);
  if (table_nbytes > nbytes || table_begin > nbytes - table_nbytes) refuse("is not whole");
  const int64_t begin = round_up(table_begin + table_nbytes, kPage);
  const int64_t weights_nbytes = field_as<int64_t>(header, "weights_nbytes");
  if (begin > nbytes || weights_nbytes != nbytes - begin) refuse("is not whole");
  check(data + table_begin, table_nbytes, checksum_field(header, "tokenizer_checksum"), 1,
        "tokenizer is");
  check(data + begin, weights_nbytes, checksum_field(header, "weights_checksum"), threads,
        "weights are");

  const Json& config = field(header, "config");
  const Shape shape = read_shape(config);
  Tensors tensors(data + begin, weights_nbytes, header);
  if (static_cast<size_t>(shape.layers) > tensors.count())
    refuse("num_hidden_layers exceeds the tensors");
  Image image;
  image.model = read_model(config, shape, tensors);
  if (tensors.end() != weights_nbytes) refuse("tensors and their sizes disagree");
  image.model.schedule = read_schedule(config, shape.layers);
  image.rope = read_rope(config, shape);
  image.name = field_as<std::string>(header, "name");
  const bool stretched =
      image.rope.scaling == Rope::Scaling::linear || image.rope.scaling == Rope::Scaling::dynamic;
  image.context_length = static_cast<int64_t>(static_cast<double>(image.rope.trained_length) *
                                              (stretched ? image.rope.factor : 1));
  add_end_ids(config, image.end_ids);
  const std::string_view table(reinterpret_cast<const char*>(data) + table_begin, table_nbytes);
  if (table.substr(0, tokenizer::kMagic.size()) == tokenizer::kMagic) {
    image.tokenizer = std::make_unique<tokenizer::Tokenizer>(data + table_begin, table_nbytes);
    const auto eos = image.tokenizer->table().eos();
    for (size_t i = 0; i < eos.size(); ++i) image.end_ids.push_back(static_cast<int32_t>(eos[i]));
  }
  return image;
}

}  // namespace mlf::image
