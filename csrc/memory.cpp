#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <new>
#include <system_error>

#include "page_cache.h"
#include "quant.h"

namespace mlf {
namespace {

void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t nbytes) {
#ifdef MADV_HUGEPAGE
  madvise(memory, nbytes, MADV_HUGEPAGE);
#endif
}

[[noreturn]] void fail(int error) { throw std::system_error(error, std::generic_category()); }

// A regular file, open to be read.
struct File {
  explicit File(const char* path)
      : number(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {  // do not wait for a pipe
    if (number < 0) fail(errno);
  }
  File(const File&) = delete;
  ~File() { close(number); }
  struct stat status() const {
    struct stat status;
    if (fstat(number, &status)) fail(errno);
    if (!S_ISREG(status.st_mode)) fail(S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
    return status;
  }

  const int number;
};

}  // namespace

void FreePages::operator()(uint8_t* memory) const { munmap(memory, nbytes); }

Pages allocate_pages(int64_t nbytes) {
  nbytes = round_up(nbytes > 0 ? nbytes : 1, kHugePage);
  // One huge page more than needed; what lies before and behind the aligned part goes back.
  void* memory =
      mmap(nullptr, nbytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  uint8_t* begin = static_cast<uint8_t*>(memory);
  const int64_t before = (kHugePage - reinterpret_cast<intptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + nbytes, kHugePage - before);
  ask_for_huge_pages(begin + before, nbytes);
  return Pages(begin + before, FreePages{nbytes});
}

void release_memory(uint8_t* memory, int64_t nbytes) {
  const int64_t unit = sysconf(_SC_PAGESIZE);
  const int64_t before = (unit - reinterpret_cast<intptr_t>(memory) % unit) % unit;
  const int64_t whole = (nbytes - before) / unit * unit;
  if (whole > 0) madvise(memory + before, whole, MADV_DONTNEED);
}

Pages map_file(const char* path, std::string_view magic, int64_t& nbytes) {
  const File file(path);
  const struct stat status = file.status();
  nbytes = status.st_size;
  if (nbytes == 0) return {};
  Pages pages;
  try {
    pages = allocate_pages(nbytes);
  } catch (const std::bad_alloc&) {
    fail(ENOMEM);
  }
  if (mmap(pages.get(), nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file.number, 0) ==
      MAP_FAILED)
    fail(errno);
  ask_for_huge_pages(pages.get(), nbytes);
  const bool cached = is_cached(pages.get(), nbytes);  // before a byte brings more
  const auto length = static_cast<int64_t>(magic.size());
  if (cached && nbytes >= length && std::memcmp(pages.get(), magic.data(), length) == 0)
    read_in_huge_pages(pages.get(), nbytes, file.number,
                       is_fresh(status.st_ctime, std::time(nullptr)));
  return pages;
}

}  // namespace mlf
