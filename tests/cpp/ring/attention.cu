// Attention of the ring alone: programs hand over their share of a query, key and value, and attend.
#include "../../../kernels/ring/attention_by_tiles.cuh"

struct AttentionArguments {
  const float* qkv;      // [QKV_ROWS]
  unsigned char* cache;  // (2, KV_HEADS, capacity, HEAD_DIM)
  unsigned* values;      // [QKV_ROWS + QUERIES], the second part of which is attended; epochs 0
  uint2* handed;         // [HANDED_WORDS], aligned to 16 bytes
  uint2* partial;        // [HEADS * MANY_PARTS * PART_WORDS]
  int capacity, position;
  float scale;
};

KERNEL(attention, AttentionArguments) {
  AttentionShared& shared = shared_memory<AttentionShared>();
  Worker me;
  if (me.warp >= WARPS) return;
  for (int i = me.thread; i < PADDED_WARPS; i += WORKERS) shared.total[i] = 0;
  sync_workers();
  constexpr unsigned kEpoch = 1;
  constexpr int kHalf = HEAD_DIM / 2;
  for (int pair = me.thread * PROGRAMS + me.program; pair < QKV_ROWS / 2; pair += WORKERS * PROGRAMS) {
    const int row = row_of(QUERY, pair);
    float low = arguments.qkv[row], high = arguments.qkv[row + kHalf];
    if constexpr (BY_TILES) {
      const float factor = row < QUERIES ? arguments.scale * LOG2_E : 1;
      hand_over(arguments.handed, pair, low * factor, high * factor, kEpoch);
    } else {
      store_value(arguments.values + row, low, kEpoch);
      store_value(arguments.values + row + kHalf, high, kEpoch);
    }
  }
  const CacheSlot cache = {arguments.cache, arguments.capacity};
  const Plan plan = plan_for(arguments.position);
  unsigned* const attended = arguments.values + QKV_ROWS;
  for (int task = me.program; task < HEADS * plan.parts; task += PROGRAMS) {
    if constexpr (BY_TILES) {
      attend_by_tiles(me, task, plan, arguments.handed, cache, arguments.position,
                      arguments.partial, attended, kEpoch + 1, shared);
    } else {
      attend(me, task, plan, arguments.values, cache, arguments.position, arguments.scale,
             arguments.partial, attended, kEpoch + 1, shared);
    }
  }
  if (plan.parts == 1) return;
  for (int i = PROGRAMS - 1 - me.program; i < HEADS; i += PROGRAMS) {
    join_parts(me, i, plan.parts, arguments.partial, attended, kEpoch + 1, shared);
  }
}
