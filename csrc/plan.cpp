#include "plan.h"

#include <cstdlib>
#include <fstream>
#include <string>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlf {

int64_t last_level_cache_nbytes() {
#if defined(__APPLE__)
  int64_t nbytes = 0;
  size_t size = sizeof nbytes;
  for (const char* name : {"hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"})
    if (sysctlbyname(name, &nbytes, &size, nullptr, 0) == 0 && nbytes > 0) return nbytes;
  return 0;
#else
  // Linux lists the caches of a processor in order of level, as "512K" or "32M".
  int64_t largest = 0;
  for (int index = 0;; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                       "/size");
    std::string text;
    if (!(file >> text)) return largest;
    char* unit = nullptr;
    int64_t nbytes = std::strtoll(text.c_str(), &unit, 10);
    if (*unit == 'K') nbytes <<= 10;
    if (*unit == 'M') nbytes <<= 20;
    if (nbytes > largest) largest = nbytes;
  }
#endif
}

Plan make_plan(const std::vector<int>& schedule, const std::vector<int64_t>& block_nbytes,
               int64_t head_nbytes, int64_t cache_nbytes, bool fetches) {
  Plan plan{std::vector<Ahead>(schedule.size()), head_nbytes, 0};
  for (size_t first = 0, end; first < schedule.size(); first = end) {
    const int block = schedule[first];
    for (end = first + 1; end < schedule.size() && schedule[end] == block;) ++end;
    const int passes = static_cast<int>(end - first);
    const int64_t nbytes = block_nbytes[block];
    const bool stays = nbytes <= cache_nbytes;  // between two passes
    plan.memory_nbytes += stays ? nbytes : passes * nbytes;
    plan.cache_nbytes += stays ? (passes - 1) * nbytes : 0;
    if (!fetches || passes == 1 || end == schedule.size()) continue;
    const int next = schedule[end];
    if (nbytes + block_nbytes[next] > cache_nbytes) continue;
    for (size_t i = first; i < end; ++i)
      plan.ahead[i] = {next, passes, static_cast<int>(i - first)};
  }
  return plan;
}

}  // namespace mlf
