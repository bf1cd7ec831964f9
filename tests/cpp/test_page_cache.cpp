// Files whose cache is in small pages, whole or in part, and what is mapped of them afterwards.
// Where the system has no huge pages for files, that it does no more than try one. Skipped (77)
// where the cache cannot be dropped, as in memory file systems, or does not tell what it has.
#include "page_cache.h"

#include <cstdio>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace {

constexpr int64_t kPart = int64_t{2} << 20, kParts = 5, kTail = 300000, kPage = 4096;
constexpr int64_t kNbytes = kParts * kPart + kTail;

int failures = 0;

uint8_t byte_at(int64_t i) { return static_cast<uint8_t>(i * 2654435761u >> 13); }

class File {
 public:
  File() {
    std::string name = "page_cache.XXXXXX";
    fd_ = mkstemp(name.data());
    unlink(name.c_str());
    std::vector<uint8_t> bytes(kNbytes);
    for (int64_t i = 0; i < kNbytes; ++i) bytes[i] = byte_at(i);
    if (fd_ < 0 || write(fd_, bytes.data(), kNbytes) != kNbytes || fsync(fd_)) {
      std::perror("a file of 10 MB in the working directory");
      std::exit(1);
    }
    posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);  // read() then caches single pages
  }
  ~File() { close(fd_); }

  int fd() const { return fd_; }
  void drop(int64_t offset = 0, int64_t nbytes = 0) const {
    posix_fadvise(fd_, offset, nbytes, POSIX_FADV_DONTNEED);
  }
  void cache_small(int64_t offset, int64_t nbytes) const {
    drop(offset, nbytes);
    char byte;
    for (int64_t at = offset; at < offset + nbytes; at += kPage)
      if (pread(fd_, &byte, 1, at) != 1) std::exit(1);
  }

 private:
  int fd_;
};

class Mapping {
 public:
  explicit Mapping(const File& file, int64_t nbytes = kNbytes) : nbytes_(nbytes) {
    const int access = PROT_READ | PROT_WRITE;
    room_ = mmap(nullptr, nbytes + kPart, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(room_) + kPart - 1) / kPart * kPart;
    data_ = static_cast<uint8_t*>(mmap(reinterpret_cast<void*>(aligned), nbytes, access,
                                       MAP_PRIVATE | MAP_FIXED, file.fd(), 0));
  }
  ~Mapping() { munmap(room_, nbytes_ + kPart); }

  uint8_t* data() const { return data_; }
  bool right() const {
    for (int64_t i = 0; i < nbytes_; ++i)
      if (data_[i] != byte_at(i)) return false;
    return true;
  }
  int64_t huge() const {  // parts that are mapped as one page
    std::FILE* smaps = std::fopen("/proc/self/smaps", "r");
    char line[512];
    bool here = false;
    long long kilobytes = 0;
    while (smaps && std::fgets(line, sizeof line, smaps)) {
      unsigned long long begin, end;
      if (std::sscanf(line, "%llx-%llx ", &begin, &end) == 2)
        here = begin == reinterpret_cast<uintptr_t>(data_);
      if (here && std::sscanf(line, "FilePmdMapped: %lld kB", &kilobytes) == 1) break;
    }
    if (smaps) std::fclose(smaps);
    return kilobytes * 1024 / kPart;
  }

 private:
  int64_t nbytes_;
  void* room_;
  uint8_t* data_;
};

// Whether this system can, now: memory may also be too fragmented, for a time.
bool possible(const File& file) {
  file.drop();
  const Mapping mapping(file);
  return !madvise(mapping.data(), kNbytes, MADV_HUGEPAGE) && mapping.right() &&
         mapping.huge() == kParts;
}

// Whether it is asked for them at all.
bool is_tried(const File& file) {
  const Mapping mapping(file);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap >= 0) close(pagemap);
  return pagemap >= 0 && sysconf(_SC_PAGESIZE) == kPage &&
         !madvise(mapping.data(), kNbytes, MADV_HUGEPAGE);
}

bool is_cached(const File& file) {
  const Mapping mapping(file);
  return mlf::is_cached(mapping.data(), kNbytes);
}

void expect_cached(const File& file, const char* what, bool want) {
  if (is_cached(file) == want) return;
  std::fprintf(stderr, "%s: must be %s\n", what, want ? "cached" : "not cached");
  ++failures;
}

void expect(const File& file, const char* what, bool fresh, int64_t want_read, int64_t want_huge) {
  int64_t read, huge;
  bool right;
  {
    const Mapping mapping(file);
    read = mlf::read_in_huge_pages(mapping.data(), kNbytes, file.fd(), fresh);
    huge = mapping.huge();
    right = mapping.right();
  }
  if (right && read == want_read && huge == want_huge) return;
  if (right && want_huge > huge && !possible(file)) return;
  std::fprintf(stderr, "%s: %d parts read again, not %d; %d huge, not %d%s\n", what,
               static_cast<int>(read), static_cast<int>(want_read), static_cast<int>(huge),
               static_cast<int>(want_huge), right ? "" : "; bytes changed");
  ++failures;
}

// Reading all of it would take minutes, and put everything else out of memory.
void a_file_larger_than_memory_is_left_alone() {
  const int64_t nbytes = 2 * sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  const File file;
  if (ftruncate(file.fd(), nbytes)) return;  // the file system has no such files
  void* data = mmap(nullptr, nbytes, PROT_READ, MAP_PRIVATE, file.fd(), 0);
  if (data == MAP_FAILED) return;
  alarm(20);
  if (mlf::read_in_huge_pages(static_cast<uint8_t*>(data), nbytes, file.fd(), true) != 0) {
    std::fprintf(stderr, "a file larger than memory was read again\n");
    ++failures;
  }
  alarm(0);
  munmap(data, nbytes);
}

void a_file_is_fresh_for_a_day() {
  constexpr int64_t kNow = 1000000, kDay = 24 * 3600;
  const bool right = mlf::is_fresh(kNow, kNow) && mlf::is_fresh(kNow - kDay + 1, kNow) &&
                     !mlf::is_fresh(kNow - kDay, kNow) && !mlf::is_fresh(kNow + 1, kNow);
  if (right) return;
  std::fprintf(stderr, "a file is fresh on another day\n");
  ++failures;
}

}  // namespace

int main() {
  a_file_is_fresh_for_a_day();
  a_file_larger_than_memory_is_left_alone();
  if (failures) return 1;
  const File file;
  file.drop();
  if (is_cached(file)) {
    std::printf("skipped: the cache of this file system cannot be dropped, or does not tell\n");
    return 77;
  }
  for (const int64_t at : {int64_t{0}, 2 * kPart - kPage, kNbytes / kPage * kPage}) {
    file.cache_small(at, 1);
    expect_cached(file, "one page", true);
    file.drop();
    expect_cached(file, "dropped", false);
  }

  const bool tried = is_tried(file);
  const int64_t all = tried && possible(file) ? kParts : 0, once = tried ? 1 : 0;
  std::printf("huge pages of files: %s%s\n", all ? "yes" : "no",
              tried ? "" : ", and not asked for");

  expect(file, "in huge pages already", true, all ? 0 : once, all);
  file.cache_small(0, kNbytes);
  expect(file, "small, and not fresh", false, 0, 0);
  {
    const Mapping other(file);
    if (!other.right()) ++failures;
    expect(file, "small, and mapped elsewhere", true, once, 0);
  }
  expect(file, "small, and fresh", true, all ? all : once, all);
  file.cache_small(2 * kPart, kPart);
  expect(file, "one part small", false, all ? 1 : 0, all);
  for (const int64_t part : {int64_t{2}, kParts - 1}) {  // with parts to read behind it, and none
    file.drop();
    file.cache_small(part * kPart + 5 * kPage, kPage);
    expect(file, "one page cached", false, all ? 1 : 0, all);
  }

  const Mapping tiny(file, kTail);
  if (mlf::read_in_huge_pages(tiny.data(), kTail, file.fd(), true) != 0 || !tiny.right()) {
    std::fprintf(stderr, "a file of less than 2 MB was read again\n");
    ++failures;
  }
  return failures > 0;
}

#else

int main() { return mlf::read_in_huge_pages(nullptr, 0, 0, true) != 0; }

#endif
