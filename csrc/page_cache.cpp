#include "page_cache.h"

namespace mlf {

bool is_fresh(int64_t changed, int64_t now) {
  constexpr int64_t kDay = 24 * 3600;
  return changed <= now && now - changed < kDay;
}

}  // namespace mlf

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "available_memory.h"

namespace mlf {
namespace {

constexpr int64_t kSmallPage = 4096;

void touch(const uint8_t* at) { static_cast<void>(*static_cast<const volatile uint8_t*>(at)); }

// Whether 2 MB of a file, which nobody touched since they were mapped, come as one page: their
// first byte then brings their last; of small pages it brings those around it, 64 KB.
bool comes_whole(const uint8_t* part, int pagemap) {
  touch(part);
  const uintptr_t last = reinterpret_cast<uintptr_t>(part) + kHugePage - kSmallPage;
  uint64_t entry = 0;
  const auto place = static_cast<off_t>(last / kSmallPage * sizeof entry);
  return pread(pagemap, &entry, sizeof entry, place) == sizeof entry && entry >> 63;  // present
}

void drop(uint8_t* part, int file, int64_t offset) {
  // What is being read cannot be dropped yet; a touch waits for it.
  for (int64_t at = 0; at < kHugePage; at += kSmallPage) touch(part + at);
  madvise(part, kHugePage, MADV_DONTNEED);  // nor what is mapped, here or elsewhere
  posix_fadvise(file, offset, kHugePage, POSIX_FADV_DONTNEED);
}

}  // namespace

bool is_cached(uint8_t* begin, int64_t nbytes) {
  unsigned char pages[kHugePage / kSmallPage];
  for (int64_t offset = 0; offset < nbytes; offset += kHugePage) {
    std::fill(std::begin(pages), std::end(pages), 0);
    if (mincore(begin + offset, std::min(kHugePage, nbytes - offset), pages)) return true;
    if (std::any_of(std::begin(pages), std::end(pages), [](int page) { return page & 1; }))
      return true;
  }
  return false;
}

int64_t read_in_huge_pages(uint8_t* begin, int64_t nbytes, int file, bool fresh) {
  const int64_t whole = nbytes / kHugePage * kHugePage;
  if (whole == 0 || sysconf(_SC_PAGESIZE) != kSmallPage || nbytes > available_nbytes() ||
      madvise(begin, nbytes, MADV_HUGEPAGE))
    return 0;
  std::vector<int64_t> small;
  small.reserve(whole / kHugePage);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return 0;
  madvise(begin, nbytes, MADV_RANDOM);  // one huge page per fault: reading ahead meets small ones
  for (int64_t offset = 0; offset < whole; offset += kHugePage)
    if (!comes_whole(begin + offset, pagemap)) small.push_back(offset);
  int64_t count = 0;
  const bool some_are_huge = static_cast<int64_t>(small.size()) < whole / kHugePage;
  if (some_are_huge || fresh) {
    for (const int64_t offset : small) {
      drop(begin + offset, file, offset);
      ++count;
      if (!comes_whole(begin + offset, pagemap)) break;
    }
  }
  madvise(begin, nbytes, MADV_NORMAL);
  close(pagemap);
  return count;
}

}  // namespace mlf

#else

namespace mlf {

bool is_cached(uint8_t*, int64_t) { return false; }

int64_t read_in_huge_pages(uint8_t*, int64_t, int, bool) { return 0; }

}  // namespace mlf
#endif
