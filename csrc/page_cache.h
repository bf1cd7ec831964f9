// The page cache of a mapped file, in huge pages.
#pragma once

#include <cstdint>

namespace mlf {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Whether anything is cached of a mapping of a file, which nobody touched yet. Linux tells it to
// who may write to the file; for others this is true.
bool is_cached(uint8_t* begin, int64_t nbytes);

// Reads a mapping of a file, which begins at a multiple of 2 MB, such that what can lies in huge
// pages. Linux fills gaps of a cached file in small pages, a few MB around each page that it has
// already, and never makes small ones large: a cache that was read in part, or lost a part, stays
// small. So what is found in small pages is dropped from the cache and read again, until that does
// not help: file systems may have no huge pages, memory no room for one, and nothing is dropped
// that another process has mapped. Where there is none in the whole file, only a `fresh` one is
// tried: writing takes small pages, too, but reading it again at every load would be in vain. Nor
// is one that is larger than the memory that is left: its end would drive out its beginning.
// Returns how many parts of 2 MB it read again. Call it before the mapping is used; what is not
// cached at all does not need it, and is faster read by several threads, and ahead.
int64_t read_in_huge_pages(uint8_t* begin, int64_t nbytes, int file, bool fresh);

// Whether a file may still be cached as it was written: for a day after its change, few are longer.
// What a clock that was set back calls the future is not, as it would be for years. In seconds.
bool is_fresh(int64_t changed, int64_t now);

}  // namespace mlf
