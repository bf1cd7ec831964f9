// Large buffers.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

namespace mlf {

struct FreePages {
  int64_t nbytes;
  void operator()(uint8_t* memory) const;
};
using Pages = std::unique_ptr<uint8_t[], FreePages>;

// Zeroed memory, aligned to 2 MB, in huge pages where the system gives them: a stream over 4 KB
// pages reads a quarter slower. Throws std::bad_alloc. Memory is only taken where it is touched.
Pages allocate_pages(int64_t nbytes);

// Gives back what lies in whole pages of the system within a part of allocate_pages' memory, which
// is not to be used again; its addresses stay taken.
void release_memory(uint8_t* memory, int64_t nbytes);

// A file in memory, at a multiple of 2 MB, because only there can the system map its page cache in
// huge pages; writing to it changes a copy. One that begins with `magic` is read, if anything of it
// is cached, so that it comes in huge pages, see page_cache.h. Returns its size in nbytes. Throws
// std::system_error.
Pages map_file(const char* path, std::string_view magic, int64_t& nbytes);

}  // namespace mlf
