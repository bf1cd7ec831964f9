// Files mapped while memory runs out.
#include "memory.h"

#include <dirent.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <system_error>
#include <vector>

namespace {

int allocations_left = -1;  // -1: as many as anyone wants

}  // namespace

void* operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

int open_files() {
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (directory && readdir(directory)) ++count;
  if (directory) closedir(directory);
  return count;
}

// Whether it was mapped, with so many allocations. `error` is that of the system, 0 if none.
bool maps(const char* path, int allocations, int& error) {
  error = 0;
  try {
    int64_t nbytes = 0;
    allocations_left = allocations;
    const mlf::Pages pages = mlf::map_file(path, "magic", nbytes);
    allocations_left = -1;
    return true;
  } catch (const std::system_error& failure) {
    error = failure.code().value();
  } catch (const std::bad_alloc&) {
  }
  allocations_left = -1;
  return false;
}

}  // namespace

int main() {
  std::string name = "memory.XXXXXX";
  const int file = mkstemp(name.data());
  std::vector<char> bytes(5 << 20, 'x');
  std::copy_n("magic", 5, bytes.begin());
  const auto size = static_cast<ssize_t>(bytes.size());
  if (file < 0 || write(file, bytes.data(), bytes.size()) != size) {
    std::perror("a file of 5 MB in the working directory");
    return 1;
  }
  const int before = open_files();
  int allocations = 0, error = 0;
  while (!maps(name.c_str(), allocations, error)) ++allocations;
  for (const char* bad : {"no such file", "/", "/dev/null"})
    if (maps(bad, -1, error) || error == 0) {
      std::fprintf(stderr, "%s was mapped\n", bad);
      return 1;
    }
  unlink(name.c_str());
  std::printf("%d allocations\n", allocations);
  if (const int left = open_files() - before) {
    std::fprintf(stderr, "%d files were left open\n", left);
    return 1;
  }
  return 0;
}
