#include "available_memory.h"

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <sstream>

namespace mlf {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// The number that a file begins with; kUnknown if there is none, as in "max".
int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t number;
  return file >> number ? number : kUnknown;
}

// The sum of what lines of "name number" say about some names; kUnknown if there is none.
int64_t sum_in(const std::string& path, std::initializer_list<const char*> names) {
  std::ifstream file(path);
  int64_t sum = 0;
  bool found = false;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t number;
    if (!(words >> name >> number) || std::find(names.begin(), names.end(), name) == names.end())
      continue;
    sum += number;
    found = true;
  }
  return found ? sum : kUnknown;
}

int64_t left_of(int64_t limit, int64_t used, int64_t cached) {
  if (limit == kUnknown || used == kUnknown) return kUnknown;
  used = std::max<int64_t>(used - (cached == kUnknown ? 0 : cached), 0);
  return std::max<int64_t>(limit - used, 0);
}

// Of a control group, by its directory: in the second version of their interface, and the first.
int64_t left_in_group(const std::string& group) {
  return left_of(std::min(number_in(group + "/memory.max"), number_in(group + "/memory.high")),
                 number_in(group + "/memory.current"),
                 sum_in(group + "/memory.stat", {"active_file", "inactive_file"}));
}

int64_t left_in_first_version_group(const std::string& group) {
  return left_of(number_in(group + "/memory.limit_in_bytes"),
                 number_in(group + "/memory.usage_in_bytes"),
                 sum_in(group + "/memory.stat", {"total_active_file", "total_inactive_file"}));
}

}  // namespace

int64_t available_nbytes(const std::string& root) {
  const int64_t kilobytes = sum_in(root + "/proc/meminfo", {"MemAvailable:"});
  int64_t left = kilobytes == kUnknown ? kUnknown : kilobytes * 1024;
  // Lines of "number:controllers:group". Groups around one limit it, too. In a container, its own
  // may be what is mounted, under whatever name it has outside.
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string mount = root + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    const auto left_in = unified ? left_in_group : left_in_first_version_group;
    std::string group = line.substr(second + 1);  // begins with "/"
    for (size_t end = group.size(); end != std::string::npos; end = group.rfind('/')) {
      group.resize(end);
      left = std::min(left, left_in(mount + group));
    }
  }
  return left;
}

}  // namespace mlf
