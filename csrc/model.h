// A model's sizes and weights.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "quant.h"

namespace mlf {

struct BlockWeights {
  const float* attention_norm;  // (hidden)
  const float* ffn_norm;        // (hidden)
  Weight q, k, v, o, gate, up, down;

  int64_t nbytes() const {
    return q.nbytes() + k.nbytes() + v.nbytes() + o.nbytes() + gate.nbytes() + up.nbytes() +
           down.nbytes();
  }
};

struct Model {
  int64_t hidden, intermediate, vocab;
  int heads, kv_heads, head_dim;
  float norm_eps;
  ActivationKind activation;
  KVKind kv_kind;
  std::vector<int> schedule;  // block of each position
  std::vector<BlockWeights> blocks;
  const float* final_norm;  // (hidden)
  Weight embedding, head;   // (vocab, hidden)

  int group() const { return heads / kv_heads; }  // query heads of a KV head
  int64_t q_size() const { return static_cast<int64_t>(heads) * head_dim; }
  int64_t kv_size() const { return static_cast<int64_t>(kv_heads) * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

}  // namespace mlf
