// mobilellm-run: a packed model on the command line, through the C API alone.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../include/mobilellm.h"

namespace {

constexpr char kUsage[] =
    "usage: mobilellm-run MODEL.mlf -p TEXT [options]\n"
    "       mobilellm-run MODEL.mlf --bench [options]\n"
    "  -p TEXT            continue this text; - reads standard input\n"
    "  -n TOKENS          tokens to generate (256; with --bench 128)\n"
    "  -t THREADS         threads (as many as processors, 4 at most)\n"
    "  --temperature T    0 takes the likeliest token, and is the default\n"
    "  --top-k K, --top-p P, --min-p P, --seed S\n"
    "                     count with a temperature above 0\n"
    "  --isa NAME         kernel table, such as neon (the best one)\n"
    "  --kv-format NAME   fp16, fp32, int16 or int8\n"
    "  --ids              print token ids instead of text\n"
    "  --bench            time a prompt and decoding, print tokens/s\n"
    "  --bench-prompt N   tokens of that prompt (512)\n"
    "  --version, --help\n";

struct Arguments {
  const char* model = nullptr;
  const char* prompt = nullptr;
  bool bench = false, ids = false;
  long long tokens = 0, bench_prompt = 512, seed = 0;
  mlf_options options{sizeof(mlf_options), 0, nullptr, nullptr};
  mlf_sampling sampling{sizeof(mlf_sampling), 0, 0, 0, 0};
};

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "mobilellm-run: %s\n", message.c_str());
  std::exit(2);
}
// Write what is buffered: what a full disk or a closed output refuses is known only then.
void flush() {
  errno = 0;
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return;
  stop("standard output cannot be written (" + std::string(std::strerror(errno ? errno : EIO)) +
       ")");
}
void must(mlf_status status) {
  if (status != MLF_OK) stop(mlf_last_error());
}

long long integer(const std::string& name, const char* text, long long least, long long most) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || errno || value < least || value > most)
    stop(name + " must be an integer in " + std::to_string(least) + ".." + std::to_string(most) +
         ", got " + text);
  return value;
}
float number(const std::string& name, const char* text) {
  char* end = nullptr;
  const float value = std::strtof(text, &end);
  if (*text == '\0' || *end != '\0') stop(name + " must be a number, got " + text);
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) stop(name + " needs a value");
      return argv[++i];
    };
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      flush();
      std::exit(0);
    }
    if (name == "--version") {
      std::printf("mobilellm-run %s\n", mlf_version());
      flush();
      std::exit(0);
    }
    if (name == "-p") a.prompt = value();
    else if (name == "-n") a.tokens = integer(name, value(), 1, 1 << 30);
    else if (name == "-t") a.options.threads = static_cast<int>(integer(name, value(), 1, 1024));
    else if (name == "--temperature") a.sampling.temperature = number(name, value());
    else if (name == "--top-k")
      a.sampling.top_k = static_cast<int>(integer(name, value(), 0, 1 << 30));
    else if (name == "--top-p") a.sampling.top_p = number(name, value());
    else if (name == "--min-p") a.sampling.min_p = number(name, value());
    else if (name == "--seed") a.seed = integer(name, value(), 0, INT64_MAX);
    else if (name == "--isa") a.options.isa = value();
    else if (name == "--kv-format") a.options.kv_format = value();
    else if (name == "--ids") a.ids = true;
    else if (name == "--bench") a.bench = true;
    else if (name == "--bench-prompt") a.bench_prompt = integer(name, value(), 1, 1 << 30);
    else if (name.size() > 1 && name[0] == '-') stop("unknown option " + name + "; see --help");
    else if (!a.model) a.model = argv[i];
    else stop("only one model can run, got " + name);
  }
  if (!a.model) stop("a model is missing; see --help");
  if (a.bench == (a.prompt != nullptr)) stop("either -p or --bench must be given");
  if (!a.tokens) a.tokens = a.bench ? 128 : 256;
  return a;
}

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The likeliest token, or one drawn; reads it unless it ends the text.
int32_t next_token(mlf_session* session, const mlf_sampling& sampling) {
  int32_t id = 0;
  must(mlf_sample(session, &sampling, &id));
  return id;
}

// The text of -p, or for "-" all of standard input, without the newline that ends it.
std::string prompt_text(const char* given) {
  std::string text = given;
  if (text != "-") return text;
  text.clear();
  char buffer[4096];
  while (const size_t nbytes = std::fread(buffer, 1, sizeof buffer, stdin))
    text.append(buffer, nbytes);
  if (std::ferror(stdin)) stop("standard input cannot be read");
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

void generate(const Arguments& a, mlf_model* model, mlf_session* session, const mlf_info& info) {
  size_t count = 0;
  const std::string prompt = prompt_text(a.prompt);
  const size_t nbytes = prompt.size();
  if (nbytes == 0) stop("the prompt must not be empty");
  std::vector<int32_t> ids(nbytes + 16);  // a byte is one token at most, and some around them
  mlf_status status = mlf_tokenize(model, prompt.data(), nbytes, 1, ids.data(), ids.size(), &count);
  if (status == MLF_ERROR_SPACE) {
    ids.resize(count);
    status = mlf_tokenize(model, prompt.data(), nbytes, 1, ids.data(), ids.size(), &count);
  }
  must(status);
  const long long room = info.context_length - static_cast<long long>(count);
  if (room < 1)
    stop("the prompt has " + std::to_string(count) + " tokens, the context holds " +
         std::to_string(info.context_length));
  must(mlf_eval(session, ids.data(), count));
  const char* text = "";
  size_t text_nbytes = 0;
  for (long long i = 0; i < std::min(a.tokens, room); ++i) {
    const int32_t id = next_token(session, a.sampling);
    if (mlf_is_end(model, id)) break;
    if (a.ids) {
      std::printf("%d\n", id);
    } else {
      must(mlf_next_text(session, id, &text, &text_nbytes));
      std::fwrite(text, 1, text_nbytes, stdout);
    }
    flush();
    if (i + 1 < std::min(a.tokens, room)) must(mlf_eval(session, &id, 1));
  }
  if (a.ids) return;
  must(mlf_next_text(session, -1, &text, &text_nbytes));
  std::fwrite(text, 1, text_nbytes, stdout);
  std::fputc('\n', stdout);
}

void bench(const Arguments& a, mlf_session* session, const mlf_info& info) {
  if (a.bench_prompt + a.tokens > info.context_length)
    stop("the context holds " + std::to_string(info.context_length) + " tokens, got " +
         std::to_string(a.bench_prompt) + " + " + std::to_string(a.tokens));
  std::vector<int32_t> ids(a.bench_prompt);
  for (size_t i = 0; i < ids.size(); ++i)  // any tokens
    ids[i] = static_cast<int32_t>((i * 7919 + 1) % static_cast<size_t>(info.vocab_size));
  const mlf_sampling greedy{sizeof(mlf_sampling), 0, 0, 0, 0};
  for (const bool warm : {false, true}) {
    must(mlf_session_rewind(session, 0));
    Clock::time_point begin = Clock::now();
    must(mlf_eval(session, ids.data(), ids.size()));
    const double prefill = seconds_since(begin);
    begin = Clock::now();
    for (long long i = 0; i < a.tokens; ++i) {
      const int32_t id = next_token(session, greedy);
      must(mlf_eval(session, &id, 1));
    }
    const double decode = seconds_since(begin);
    if (warm)
      std::printf(
          "%s, %s, %d threads\nprefill %lld tokens: %.1f tokens/s\n"
          "decode %lld tokens: %.1f tokens/s\n",
          info.name, info.isa, info.threads, a.bench_prompt,
          static_cast<double>(a.bench_prompt) / prefill, a.tokens,
          static_cast<double>(a.tokens) / decode);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments a = parse(argc, argv);
  mlf_model* model = nullptr;
  mlf_session* session = nullptr;
  must(mlf_open(a.model, &a.options, &model));
  mlf_info info{};
  info.size = sizeof info;
  must(mlf_get_info(model, &info));
  must(mlf_session_open(model, &session));
  must(mlf_session_seed(session, static_cast<uint64_t>(a.seed)));
  if (a.bench) bench(a, session, info);
  else generate(a, model, session, info);
  mlf_session_close(session);
  mlf_close(model);
  flush();
}
