// libFuzzer target: whatever the bytes of an image, reading it and running what was accepted does
// no harm. Checksums are not compared in this build, or nothing would ever be accepted.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "image/image.h"
#include "memory.h"
#include "tokenizer/detokenizer.h"

namespace {

constexpr int64_t kMaxWork = 1 << 22;  // values in a step; more would only be slow

void run(mlf::image::Image& image) {
  const mlf::Model& model = image.model;
  const int64_t widest =
      model.hidden + model.intermediate + model.vocab + int64_t{model.heads} * model.head_dim;
  const int64_t positions = static_cast<int64_t>(model.schedule.size());
  if (widest * positions > kMaxWork ||
      positions * model.kv_heads * model.head_dim * mlf::kPageTokens > kMaxWork)
    return;
  if (image.tokenizer) {
    const std::vector<int32_t> ids =
        image.tokenizer->encode("A text <|im_end|>\n 12\xF0\x9F", true);
    mlf::tokenizer::Detokenizer detokenizer(*image.tokenizer);
    for (const int32_t id : ids) detokenizer.push(id);
    detokenizer.finish();
  }
  const int64_t half = model.head_dim / 2;
  std::vector<float> cos(3 * half), sin(3 * half), logits(model.vocab);
  image.rope.rows(0, 3, cos.data(), sin.data());
  mlf::Executor executor(model, 1, mlf::kernel_table(""), 0, true);
  const auto cache = executor.new_cache();
  const int32_t ids[3] = {0, static_cast<int32_t>(model.vocab - 1), 0};
  executor.forward({{cache.get(), ids, cos.data(), sin.data(), 3, 1}}, logits.data());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // In memory of its own, aligned as a mapped file is, and of exactly this size.
  void* exact = nullptr;
  if (posix_memalign(&exact, 64, size ? size : 1)) return 0;
  std::memcpy(exact, data, size);
  try {
    mlf::image::Image image =
        mlf::image::read_image(static_cast<const uint8_t*>(exact), static_cast<int64_t>(size), 1);
    run(image);
  } catch (const std::invalid_argument&) {
  } catch (const std::bad_alloc&) {
  }
  free(exact);
  return 0;
}
