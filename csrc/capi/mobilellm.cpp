// The C API: arguments checked, exceptions turned into statuses. See include/mobilellm.h.
#include "../include/mobilellm.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "../dispatch.h"
#include "../image/image.h"
#include "../memory.h"
#include "../plan.h"
#include "../sampling.h"
#include "../tokenizer/detokenizer.h"

struct mlf_model {
  mlf::Pages memory;
  mlf::image::Image image;
  const mlf::KernelTable* kernels;
  std::unique_ptr<mlf::Executor> executor;
};

struct mlf_session {
  mlf_model* model;
  std::unique_ptr<mlf::KVCache> cache;
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  bool has_logits = false;
  uint64_t random = 0;
  std::optional<mlf::tokenizer::Detokenizer> answer;
  std::string text;
};

namespace {

constexpr int kDefaultThreads = 4;  // phones have four fast cores at most; more wait for the slow
constexpr size_t kPiece = 512;      // tokens per step, as the chunks of the executor

thread_local char last_error[512] = "";

struct Failure {
  mlf_status status;
  std::string message;
};

mlf_status fail(mlf_status status, const char* message) noexcept {
  std::strncpy(last_error, message, sizeof last_error - 1);
  // One line, whatever a file's name or field has in it.
  for (char& c : last_error)
    if (c != '\0' && static_cast<unsigned char>(c) < 0x20) c = ' ';
  return status;
}

template <class Body>
mlf_status guarded(Body body) noexcept {
  try {
    body();
    return MLF_OK;
  } catch (const Failure& failure) {
    return fail(failure.status, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return fail(MLF_ERROR_MEMORY, "out of memory");
  } catch (const std::length_error&) {
    return fail(MLF_ERROR_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(MLF_ERROR_INTERNAL, error.what());
  } catch (...) {
    return fail(MLF_ERROR_INTERNAL, "unknown error");
  }
}

[[noreturn]] void argument(const std::string& message) {
  throw Failure{MLF_ERROR_ARGUMENT, message};
}
void require(const void* pointer, const char* name) {
  if (!pointer) argument(std::string(name) + " must not be null");
}
template <class T>
void require_size(const T* structure, const char* name) {
  if (structure->size < sizeof(T))
    argument(std::string(name) + ".size must be " + std::to_string(sizeof(T)) + ", got " +
             std::to_string(structure->size));
}

int threads_of(int32_t threads) {
  if (threads < 0 || threads > 1024)
    argument("threads must be in 0..1024, got " + std::to_string(threads));
  const int processors = static_cast<int>(std::thread::hardware_concurrency());
  return threads ? threads : std::clamp(processors, 1, kDefaultThreads);
}

mlf::KVKind kv_kind_of(const char* name, mlf::KVKind otherwise) {
  if (!name) return otherwise;
  mlf::KVKind kind;
  if (mlf::find_kv_kind(name, kind)) return kind;
  argument(std::string("kv_format must be fp16, fp32, int16 or int8, got ") + name);
}

const mlf::KernelTable& table_of(const char* isa) {
  try {
    return mlf::kernel_table(isa ? isa : "");
  } catch (const std::invalid_argument& error) {
    argument(error.what());
  }
}

std::unique_ptr<mlf_model> open_model(const char* path, const mlf_options& options) {
  const int threads = threads_of(options.threads);
  auto model = std::make_unique<mlf_model>();
  model->kernels = &table_of(options.isa);
  kv_kind_of(options.kv_format, mlf::KVKind::int16);
  try {
    int64_t nbytes = 0;
    model->memory = mlf::map_file(path, mlf::image::kMagic, nbytes);
    model->image = mlf::image::read_image(model->memory.get(), nbytes, threads);
  } catch (const std::system_error& error) {
    throw Failure{MLF_ERROR_FILE,
                  std::string(path) + ": cannot be read (" + error.code().message() + ")"};
  } catch (const std::invalid_argument& error) {
    throw Failure{MLF_ERROR_FILE, std::string(path) + ": " + error.what()};
  }
  mlf::Model& parts = model->image.model;
  parts.kv_kind = kv_kind_of(options.kv_format, parts.kv_kind);
  model->executor = std::make_unique<mlf::Executor>(parts, threads, *model->kernels,
                                                    mlf::last_level_cache_nbytes(), true);
  return model;
}

const mlf::tokenizer::Tokenizer& tokenizer_of(const mlf_model* model) {
  require(model, "model");
  if (!model->image.tokenizer) argument("the image has no tokenizer that this library can read");
  return *model->image.tokenizer;
}

void check_ids(const mlf_model& model, const int32_t* ids, size_t count) {
  const int64_t vocab = model.image.model.vocab;
  for (size_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      argument("ids must be in 0.." + std::to_string(vocab - 1) + ", got " +
               std::to_string(ids[i]));
}

// Splitmix64 (Steele et al. 2014), as a number in [0, 1).
double next_uniform(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

int32_t choose(mlf_session& session, const mlf_sampling& sampling) {
  if (!(sampling.temperature >= 0) || !std::isfinite(sampling.temperature))
    argument("temperature must be finite and >= 0");
  if (sampling.top_k < 0) argument("top_k must be >= 0");
  if (!(sampling.top_p >= 0 && sampling.top_p <= 1)) argument("top_p must be in 0..1");
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) argument("min_p must be in 0..1");
  const std::vector<float>& logits = session.logits;
  const int64_t vocab = static_cast<int64_t>(logits.size());
  const mlf::Filters filters{sampling.temperature, std::min<int64_t>(sampling.top_k, vocab),
                             sampling.top_p == 0 ? 1.0 : sampling.top_p, sampling.min_p};
  const double uniform = sampling.temperature == 0 ? 0 : next_uniform(session.random);
  const mlf::Choice choice =
      mlf::choose(*session.model->kernels, logits.data(), logits.data(), vocab, filters, uniform);
  if (std::isnan(choice.logprob)) throw Failure{MLF_ERROR_NUMBERS, "the logits are not finite"};
  return static_cast<int32_t>(choice.token);
}

void eval(mlf_session& session, const int32_t* ids, size_t count) {
  mlf_model& model = *session.model;
  const int64_t length = session.cache->length(), context = model.image.context_length;
  check_ids(model, ids, count);
  if (count > static_cast<uint64_t>(context) || length > context - static_cast<int64_t>(count))
    throw Failure{MLF_ERROR_CONTEXT, "the context holds " + std::to_string(context) +
                                         " tokens, got " + std::to_string(length) + " + " +
                                         std::to_string(count)};
  const int64_t half = model.image.model.head_dim / 2;
  session.has_logits = false;
  session.logits.resize(model.image.model.vocab);
  session.tokens.reserve(session.tokens.size() + count);
  std::vector<float> cos(std::min(count, kPiece) * half), sin(cos.size());
  for (size_t first = 0; first < count; first += kPiece) {
    const int64_t piece = static_cast<int64_t>(std::min(kPiece, count - first));
    model.image.rope.rows(session.cache->length(), piece, cos.data(), sin.data());
    const bool last = first + kPiece >= count;
    model.executor->forward(
        {{session.cache.get(), ids + first, cos.data(), sin.data(), piece, last ? 1 : 0}},
        session.logits.data());
    session.tokens.insert(session.tokens.end(), ids + first, ids + first + piece);
  }
  session.has_logits = true;
}

}  // namespace

extern "C" {

const char* mlf_version(void) { return MLF_VERSION; }
const char* mlf_last_error(void) { return last_error; }

mlf_status mlf_open(const char* path, const mlf_options* options, mlf_model** model) {
  return guarded([&] {
    require(path, "path");
    require(model, "model");
    if (options) require_size(options, "options");
    *model = open_model(path, options ? *options : mlf_options{}).release();
  });
}

void mlf_close(mlf_model* model) { delete model; }

mlf_status mlf_get_info(const mlf_model* model, mlf_info* info) {
  return guarded([&] {
    require(model, "model");
    require(info, "info");
    require_size(info, "info");
    const mlf::image::Image& image = model->image;
    *info = {info->size,
             image.name.c_str(),
             model->kernels->name,
             model->executor->threads(),
             static_cast<int32_t>(image.model.vocab),
             image.context_length,
             image.tokenizer ? 1 : 0};
  });
}

mlf_status mlf_tokenize(const mlf_model* model, const char* text, size_t nbytes,
                        int32_t add_special, int32_t* ids, size_t capacity, size_t* count) {
  return guarded([&] {
    const mlf::tokenizer::Tokenizer& tokenizer = tokenizer_of(model);
    if (nbytes) require(text, "text");
    require(count, "count");
    if (nbytes >= size_t{1} << 30) argument("text must be shorter than 1 GB");
    const std::vector<int32_t> all = tokenizer.encode({nbytes ? text : "", nbytes}, add_special);
    *count = all.size();
    if (all.size() > capacity)
      throw Failure{MLF_ERROR_SPACE, "ids must hold " + std::to_string(all.size())};
    if (!all.empty()) require(ids, "ids");
    std::copy(all.begin(), all.end(), ids);
  });
}

mlf_status mlf_detokenize(const mlf_model* model, const int32_t* ids, size_t count,
                          int32_t skip_special, char* text, size_t capacity, size_t* nbytes) {
  return guarded([&] {
    const mlf::tokenizer::Tokenizer& tokenizer = tokenizer_of(model);
    if (count) require(ids, "ids");
    require(nbytes, "nbytes");
    const std::string all = tokenizer.decode(ids, count, skip_special);
    *nbytes = all.size();
    if (all.size() >= capacity)
      throw Failure{MLF_ERROR_SPACE, "text must hold " + std::to_string(all.size() + 1)};
    require(text, "text");
    std::memcpy(text, all.c_str(), all.size() + 1);
  });
}

int32_t mlf_is_end(const mlf_model* model, int32_t id) {
  if (!model) return 0;
  const std::vector<int32_t>& ids = model->image.end_ids;
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

mlf_status mlf_session_open(mlf_model* model, mlf_session** session) {
  return guarded([&] {
    require(model, "model");
    require(session, "session");
    auto made = std::make_unique<mlf_session>();
    made->model = model;
    made->cache = model->executor->new_cache();
    *session = made.release();
  });
}

void mlf_session_close(mlf_session* session) { delete session; }

int64_t mlf_session_length(const mlf_session* session) {
  return session ? session->cache->length() : 0;
}

mlf_status mlf_session_rewind(mlf_session* session, int64_t length) {
  return guarded([&] {
    require(session, "session");
    if (length < 0 || length > session->cache->length())
      argument("length must be in 0.." + std::to_string(session->cache->length()) + ", got " +
               std::to_string(length));
    session->cache->set_length(length);
    session->tokens.resize(length);
    session->has_logits = false;
    session->answer.reset();
  });
}

mlf_status mlf_session_seed(mlf_session* session, uint64_t seed) {
  return guarded([&] {
    require(session, "session");
    session->random = seed;
  });
}

mlf_status mlf_eval(mlf_session* session, const int32_t* ids, size_t count) {
  return guarded([&] {
    require(session, "session");
    require(ids, "ids");
    if (count == 0) argument("count must be >= 1, got 0");
    eval(*session, ids, count);
  });
}

mlf_status mlf_get_logits(const mlf_session* session, const float** logits) {
  return guarded([&] {
    require(session, "session");
    require(logits, "logits");
    if (!session->has_logits) argument("there are no logits before mlf_eval");
    *logits = session->logits.data();
  });
}

mlf_status mlf_sample(mlf_session* session, const mlf_sampling* sampling, int32_t* id) {
  return guarded([&] {
    require(session, "session");
    require(id, "id");
    if (sampling) require_size(sampling, "sampling");
    if (!session->has_logits) argument("there are no logits before mlf_eval");
    *id = choose(*session, sampling ? *sampling : mlf_sampling{});
  });
}

mlf_status mlf_next_text(mlf_session* session, int32_t id, const char** text, size_t* nbytes) {
  return guarded([&] {
    require(session, "session");
    require(text, "text");
    const mlf::tokenizer::Tokenizer& tokenizer = tokenizer_of(session->model);
    if (id >= 0) check_ids(*session->model, &id, 1);
    if (!session->answer) session->answer.emplace(tokenizer, session->tokens);
    session->text = id < 0 ? session->answer->finish() : session->answer->push(id);
    if (id < 0) session->answer.reset();
    *text = session->text.c_str();
    if (nbytes) *nbytes = session->text.size();
  });
}

}  // extern "C"
