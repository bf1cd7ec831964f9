/* Runs a packed model (.mlf, made by `mobilellm-fast pack`) from C.
 *
 * Every function that can fail returns a status and leaves its outputs alone when it does;
 * mlf_last_error() then tells the calling thread why, in one line. No exception leaves a function.
 * A model may be shared by threads: its calls take turns. A session belongs to one thread at a
 * time. A calling thread and those that the library starts need 512 KB of stack: musl gives
 * threads less unless the program asks for more (-Wl,-z,stack-size=1048576).
 * Structures begin with their size in bytes, so that later versions can add fields to them. */
#ifndef MOBILELLM_H
#define MOBILELLM_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MLF_API __attribute__((visibility("default")))
#else
#define MLF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mlf_model mlf_model;
typedef struct mlf_session mlf_session;

typedef enum mlf_status {
  MLF_OK = 0,
  MLF_ERROR_ARGUMENT = 1, /* an argument is null, out of range or names nothing */
  MLF_ERROR_FILE = 2,     /* the file cannot be read, or is no whole image */
  MLF_ERROR_MEMORY = 3,
  MLF_ERROR_SPACE = 4,   /* the caller's buffer is too small; the size it needs was written */
  MLF_ERROR_CONTEXT = 5, /* the session would become longer than the model's context */
  MLF_ERROR_NUMBERS = 6, /* the model computed something that is not finite */
  MLF_ERROR_INTERNAL = 7
} mlf_status;

/* What an image is opened with; zeros are the defaults. */
typedef struct mlf_options {
  size_t size;           /* sizeof(mlf_options) */
  int32_t threads;       /* 1..1024; 0: as many as processors, 4 at most */
  const char* isa;       /* name of a kernel table, such as "neon"; null: the best one */
  const char* kv_format; /* "fp16", "fp32", "int16" or "int8"; null: fp32 for float weights,
                            else int16 */
} mlf_options;

typedef struct mlf_info {
  size_t size;      /* sizeof(mlf_info), set by the caller */
  const char* name; /* of the model; lives as long as it, as does isa */
  const char* isa;  /* the kernel table in use */
  int32_t threads;
  int32_t vocab_size;     /* token ids are 0..vocab_size - 1 */
  int64_t context_length; /* most tokens of a session */
  int32_t has_tokenizer;  /* 0: the image has none that this library can read */
} mlf_info;

/* How the next token is chosen. */
typedef struct mlf_sampling {
  size_t size;       /* sizeof(mlf_sampling) */
  float temperature; /* 0: the likeliest token; finite, >= 0 */
  int32_t top_k;     /* keep the k likeliest; 0: all */
  float top_p;       /* keep the likeliest that make up this probability; 0 or 1: all */
  float min_p;       /* keep those at least this fraction as likely as the likeliest; 0: all */
} mlf_sampling;

/* "0.1.0" */
MLF_API const char* mlf_version(void);
/* Why the last call of this thread failed; "" if none did. Valid until its next failure. */
MLF_API const char* mlf_last_error(void);

/* Open an image. Null options are the defaults. Its memory is shared with other processes. */
MLF_API mlf_status mlf_open(const char* path, const mlf_options* options, mlf_model** model);
/* Close a model; its sessions must be closed before. Null is allowed. */
MLF_API void mlf_close(mlf_model* model);
MLF_API mlf_status mlf_get_info(const mlf_model* model, mlf_info* info);

/* Write the ids of a text (UTF-8, `nbytes` bytes) to ids and how many to count; at most `capacity`,
 * else MLF_ERROR_SPACE. add_special: with the tokens that the model expects around a text. */
MLF_API mlf_status mlf_tokenize(const mlf_model* model, const char* text, size_t nbytes,
                                int32_t add_special, int32_t* ids, size_t capacity, size_t* count);
/* Write the text of ids, and a zero byte behind it, to text; its length without that to nbytes. */
MLF_API mlf_status mlf_detokenize(const mlf_model* model, const int32_t* ids, size_t count,
                                  int32_t skip_special, char* text, size_t capacity,
                                  size_t* nbytes);
/* 1 if the token ends a text, else 0. */
MLF_API int32_t mlf_is_end(const mlf_model* model, int32_t id);

/* An empty conversation with the model, which must outlive it. */
MLF_API mlf_status mlf_session_open(mlf_model* model, mlf_session** session);
MLF_API void mlf_session_close(mlf_session* session);
/* Tokens read so far. */
MLF_API int64_t mlf_session_length(const mlf_session* session);
/* Forget all but the first tokens; logits are gone until the next mlf_eval. */
MLF_API mlf_status mlf_session_rewind(mlf_session* session, int64_t length);
/* Where random numbers begin; the same seed gives the same tokens again. */
MLF_API mlf_status mlf_session_seed(mlf_session* session, uint64_t seed);

/* Read tokens; afterwards there are logits for the next one. */
MLF_API mlf_status mlf_eval(mlf_session* session, const int32_t* ids, size_t count);
/* The logits (vocab_size) after the last mlf_eval; valid until the next. */
MLF_API mlf_status mlf_get_logits(const mlf_session* session, const float** logits);
/* Choose the next token from them; null sampling takes the likeliest. Does not read it. */
MLF_API mlf_status mlf_sample(mlf_session* session, const mlf_sampling* sampling, int32_t* id);
/* Text to show for a token of an answer, whole characters only; a negative id ends the answer and
 * gives what was held back. `text` is valid until the next call, ends with a zero byte, and may be
 * empty. An answer continues what the session has read when its first token comes. */
MLF_API mlf_status mlf_next_text(mlf_session* session, int32_t id, const char** text,
                                 size_t* nbytes);

#ifdef __cplusplus
}
#endif
#endif
