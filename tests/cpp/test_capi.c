/* The C API from plain C: test_capi MODEL.mlf SCRATCH. Prints the first failure and returns 1. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mobilellm.h"

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, mlf_last_error()); \
      return 1;                                                                   \
    }                                                                             \
  } while (0)

static int wrong_arguments(const char* path, mlf_model* model, mlf_session* session) {
  mlf_model* none = NULL;
  mlf_options options;
  mlf_info info;
  mlf_sampling sampling;
  size_t count = 99;
  int32_t id = -1;
  const float* logits = NULL;
  const char* text = NULL;
  memset(&options, 0, sizeof options);
  memset(&info, 0, sizeof info);
  memset(&sampling, 0, sizeof sampling);
  CHECK(mlf_open(NULL, NULL, &none) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_open(path, NULL, NULL) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_open(path, &options, &none) == MLF_ERROR_ARGUMENT); /* size 0 */
  options.size = sizeof options;
  options.threads = -1;
  CHECK(mlf_open(path, &options, &none) == MLF_ERROR_ARGUMENT);
  CHECK(strstr(mlf_last_error(), "threads") != NULL);
  options.threads = 1;
  options.isa = "none";
  CHECK(mlf_open(path, &options, &none) == MLF_ERROR_ARGUMENT);
  CHECK(strstr(mlf_last_error(), "isa") != NULL);
  options.isa = NULL;
  options.kv_format = "int3";
  CHECK(mlf_open(path, &options, &none) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_open("/nowhere/model.mlf", NULL, &none) == MLF_ERROR_FILE);
  CHECK(none == NULL);
  CHECK(mlf_get_info(model, &info) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_sample(session, NULL, &id) == MLF_ERROR_ARGUMENT); /* nothing read yet */
  CHECK(mlf_get_logits(session, &logits) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_eval(session, &id, 1) == MLF_ERROR_ARGUMENT); /* id -1 */
  id = 0x7fffffff;
  CHECK(mlf_eval(session, &id, 1) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_next_text(session, id, &text, &count) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_eval(session, &id, 0) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_session_rewind(session, 1) == MLF_ERROR_ARGUMENT);
  CHECK(mlf_tokenize(model, "a b c d", 7, 0, &id, 0, &count) == MLF_ERROR_SPACE);
  CHECK(count >= 1 && count <= 7);
  CHECK(mlf_session_length(session) == 0);
  mlf_close(NULL);
  mlf_session_close(NULL);
  return 0;
}

static int generate(mlf_model* model, mlf_session* session) {
  static const char prompt[] = "The capital of France is";
  int32_t ids[64], drawn[2] = {-1, -1}, id = -1;
  char text[256];
  const char* piece = NULL;
  size_t count = 0, nbytes = 0, i;
  mlf_info info;
  mlf_sampling sampling;
  const float* logits = NULL;
  memset(&info, 0, sizeof info);
  info.size = sizeof info;
  CHECK(mlf_get_info(model, &info) == MLF_OK);
  CHECK(info.has_tokenizer && info.vocab_size > 0 && info.context_length > 0);
  CHECK(mlf_tokenize(model, prompt, strlen(prompt), 1, ids, 64, &count) == MLF_OK);
  CHECK(mlf_detokenize(model, ids, count, 1, text, sizeof text, &nbytes) == MLF_OK);
  CHECK(nbytes == strlen(text) && strstr(text, "France") != NULL);
  CHECK(mlf_detokenize(model, ids, count, 1, text, nbytes, &nbytes) == MLF_ERROR_SPACE);
  CHECK(mlf_eval(session, ids, count) == MLF_OK);
  CHECK(mlf_session_length(session) == (int64_t)count);
  CHECK(mlf_get_logits(session, &logits) == MLF_OK);
  CHECK(mlf_sample(session, NULL, &id) == MLF_OK);
  for (i = 0; i < (size_t)info.vocab_size; ++i) CHECK(logits[i] <= logits[id]);
  CHECK(mlf_next_text(session, id, &piece, &nbytes) == MLF_OK);
  CHECK(strlen(piece) == nbytes);
  CHECK(mlf_next_text(session, -1, &piece, NULL) == MLF_OK);

  memset(&sampling, 0, sizeof sampling);
  sampling.size = sizeof sampling;
  sampling.temperature = 1.5f;
  for (i = 0; i < 2; ++i) { /* the same seed, the same token */
    CHECK(mlf_session_seed(session, 7) == MLF_OK);
    CHECK(mlf_sample(session, &sampling, &drawn[i]) == MLF_OK);
  }
  CHECK(drawn[0] == drawn[1]);
  sampling.top_k = 1;
  CHECK(mlf_sample(session, &sampling, &drawn[0]) == MLF_OK && drawn[0] == id);
  sampling.top_p = 2;
  CHECK(mlf_sample(session, &sampling, &drawn[0]) == MLF_ERROR_ARGUMENT);
  sampling.top_p = 0;
  sampling.temperature = -1;
  CHECK(mlf_sample(session, &sampling, &drawn[0]) == MLF_ERROR_ARGUMENT);

  /* read again in two steps: the same logits */
  {
    float* first = malloc(sizeof(float) * (size_t)info.vocab_size);
    CHECK(first != NULL);
    memcpy(first, logits, sizeof(float) * (size_t)info.vocab_size);
    CHECK(mlf_session_rewind(session, 1) == MLF_OK);
    CHECK(mlf_get_logits(session, &logits) == MLF_ERROR_ARGUMENT);
    CHECK(mlf_eval(session, ids + 1, count - 1) == MLF_OK);
    CHECK(mlf_get_logits(session, &logits) == MLF_OK);
    CHECK(memcmp(first, logits, sizeof(float) * (size_t)info.vocab_size) == 0);
    free(first);
  }
  return 0;
}

/* Copies with one byte changed, or cut short, are refused. */
static int damaged(const char* path, const char* scratch) {
  static const double places[] = {0.0, 0.00001, 0.001, 0.01, 0.5, 0.999};
  size_t i;
  for (i = 0; i < 2 * sizeof places / sizeof places[0]; ++i) {
    mlf_model* model = NULL;
    char* bytes;
    long size, at;
    FILE* file = fopen(path, "rb");
    CHECK(file != NULL);
    CHECK(fseek(file, 0, SEEK_END) == 0);
    size = ftell(file);
    rewind(file);
    bytes = malloc((size_t)size);
    CHECK(bytes != NULL && fread(bytes, 1, (size_t)size, file) == (size_t)size);
    fclose(file);
    at = (long)(places[i / 2] * (double)size);
    if (i % 2) bytes[at] ^= 0x10;
    file = fopen(scratch, "wb");
    CHECK(file != NULL);
    CHECK(fwrite(bytes, 1, (size_t)(i % 2 ? size : at), file) == (size_t)(i % 2 ? size : at));
    fclose(file);
    free(bytes);
    /* A gap between two parts has no checksum. */
    if (mlf_open(scratch, NULL, &model) == MLF_OK) {
      CHECK(i % 2 && places[i / 2] == 0.001);
      mlf_close(model);
    } else {
      CHECK(strchr(mlf_last_error(), '\n') == NULL && strlen(mlf_last_error()) > 0);
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  mlf_model* model = NULL;
  mlf_session* session = NULL;
  if (argc != 3) return 2;
  CHECK(strlen(mlf_version()) > 0);
  CHECK(mlf_open(argv[1], NULL, &model) == MLF_OK);
  CHECK(mlf_session_open(model, &session) == MLF_OK);
  if (wrong_arguments(argv[1], model, session)) return 1;
  if (generate(model, session)) return 1;
  mlf_session_close(session);
  mlf_close(model);
  if (damaged(argv[1], argv[2])) return 1;
  puts("ok");
  return 0;
}
