#include "memory.h"

#include <sys/mman.h>

#include <new>

#include "quant.h"

namespace mlf {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

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
#ifdef MADV_HUGEPAGE
  madvise(begin + before, nbytes, MADV_HUGEPAGE);
#endif
  return Pages(begin + before, FreePages{nbytes});
}

}  // namespace mlf
