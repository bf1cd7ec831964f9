// What is left to a process, told by files as Linux has them: of the system and of control groups.
#include "available_memory.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <string>

namespace {

using Files = std::map<std::string, std::string>;  // text by path

constexpr int64_t kNobodyTells = std::numeric_limits<int64_t>::max();
int failures = 0;

void expect(const char* what, const Files& files, int64_t want) {
  std::string root = (std::filesystem::temp_directory_path() / "available.XXXXXX").string();
  if (!mkdtemp(root.data())) {
    std::perror("a temporary directory");
    std::exit(1);
  }
  for (const auto& [name, text] : files) {
    const std::filesystem::path path = root + name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  const int64_t got = mlf::available_nbytes(root);
  std::filesystem::remove_all(root);
  if (got == want) return;
  std::fprintf(stderr, "%s: %lld bytes, not %lld\n", what, static_cast<long long>(got),
               static_cast<long long>(want));
  ++failures;
}

const char* const kMeminfo =
    "MemTotal:        2000000 kB\nMemFree:          400000 kB\nMemAvailable:    1000000 kB\n"
    "HugePages_Total:       0\n";
constexpr int64_t kAvailable = 1024000000;

Files system_and(const Files& more) {
  Files files{{"/proc/meminfo", kMeminfo}};
  files.insert(more.begin(), more.end());
  return files;
}

void without_groups() {
  expect("nobody tells", {}, kNobodyTells);
  expect("a system from before 2014", {{"/proc/meminfo", "MemFree: 400000 kB\n"}}, kNobodyTells);
  expect("a system", system_and({}), kAvailable);
  expect("groups without limits", system_and({{"/proc/self/cgroup", "0::/user.slice\n"}}),
         kAvailable);
}

void groups() {
  const std::string at = "/sys/fs/cgroup";
  const Files container = system_and({{"/proc/self/cgroup", "0::/\n"},
                                      {at + "/memory.max", "5000000\n"},
                                      {at + "/memory.high", "max\n"},
                                      {at + "/memory.current", "2000000\n"}});
  expect("a container", container, 3000000);
  const auto with = [&container](const std::string& path, const std::string& text) {
    Files files = container;
    files[path] = text;
    return files;
  };
  expect("a container that may have all", with(at + "/memory.max", "max\n"), kAvailable);
  expect("one of more than the system has", with(at + "/memory.max", "9000000000\n"), kAvailable);
  expect("one that is slowed down first", with(at + "/memory.high", "4000000\n"), 2000000);
  expect("one beyond its limit", with(at + "/memory.current", "6000000\n"), 0);
  expect("one that caches files",
         with(at + "/memory.stat",
              "anon 400000\nfile 1600000\nactive_file 1000000\ninactive_file 500000\n"),
         4500000);
  expect("one without a system",
         {{"/proc/self/cgroup", "0::/\n"},
          {at + "/memory.max", "5000000\n"},
          {at + "/memory.current", "2000000\n"}},
         3000000);

  Files nested = system_and({{"/proc/self/cgroup", "0::/outer/inner\n"},
                             {at + "/outer/inner/memory.max", "5000000\n"},
                             {at + "/outer/inner/memory.current", "1000000\n"},
                             {at + "/outer/memory.max", "7000000\n"},
                             {at + "/outer/memory.current", "1000000\n"}});
  expect("the inner group has less", nested, 4000000);
  nested[at + "/outer/memory.current"] = "6000000\n";
  expect("the outer group has less", nested, 1000000);
}

void groups_of_the_first_version() {
  const std::string at = "/sys/fs/cgroup/memory";
  const std::string groups = "11:cpu,cpuacct:/box\n10:devices,memory:/box\n0::/\n";
  Files files = system_and({{"/proc/self/cgroup", groups},
                            {at + "/memory.limit_in_bytes", "9223372036854771712\n"},
                            {at + "/memory.usage_in_bytes", "70000000\n"},
                            {at + "/box/memory.limit_in_bytes", "5000000\n"},
                            {at + "/box/memory.usage_in_bytes", "2000000\n"}});
  expect("a group", files, 3000000);
  files[at + "/box/memory.stat"] =
      "inactive_file 100000\ntotal_inactive_file 300000\ntotal_active_file 200000\n";
  expect("one that caches files", files, 3500000);
  files[at + "/box/memory.limit_in_bytes"] = "9223372036854771712\n";
  expect("one without a limit", files, kAvailable);
  expect("a container, whose group is what it sees mounted",
         system_and({{"/proc/self/cgroup", groups},
                     {at + "/memory.limit_in_bytes", "5000000\n"},
                     {at + "/memory.usage_in_bytes", "2000000\n"}}),
         3000000);
  expect("limits of processors alone",
         system_and({{"/proc/self/cgroup", "11:cpu,cpuacct:/box\n"},
                     {at + "/memory.limit_in_bytes", "5000000\n"},
                     {at + "/memory.usage_in_bytes", "2000000\n"}}),
         kAvailable);
}

void this_machine() {
#ifdef __linux__
  const int64_t available = mlf::available_nbytes();
  if (available > 0 && available <= sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE)) return;
  std::fprintf(stderr, "%lld bytes of memory are available\n", static_cast<long long>(available));
  ++failures;
#endif
}

}  // namespace

int main() {
  without_groups();
  groups();
  groups_of_the_first_version();
  this_machine();
  return failures ? 1 : 0;
}
