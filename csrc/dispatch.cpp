#include "dispatch.h"

#include <cstdint>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlf {
namespace {

// One function per table: can this machine run it? The compiler's check covers the operating
// system's part too (that it saves the wider registers).
bool runs_scalar() { return true; }
#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool runs_avxvnni() {
  unsigned eax = 0, ebx, ecx, edx;  // __builtin_cpu_supports knows it in new compilers alone
  return runs_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
bool runs_avx512vnni() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool runs_avx512vnni_ymm() { return runs_avx512vnni(); }
bool runs_amx_emulated() { return runs_avx512vnni(); }
// Linux gives a process the registers of AMX when it asks for them, and refuses small alternate
// signal stacks from then on. So runs_amx only asks whether it would; request_amx asks for them,
// once the table is chosen.
constexpr int kAmxRegisters = 18;  // their number in XCR0
bool runs_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  constexpr unsigned kTileAndInt8 = 3u << 24;
  unsigned eax, ebx, ecx, edx = 0;
  uint64_t supported = 0;
  return runs_avx512vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (edx & kTileAndInt8) == kTileAndInt8 &&
         syscall(SYS_arch_prctl, kSupported, &supported) == 0 && (supported >> kAmxRegisters & 1);
#else
  return false;
#endif
}
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kAmxRegisters) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
bool runs_neon() { return true; }  // part of Armv8-A
#if defined(__linux__)
// The bits of the kernel's interface, which older headers lack.
bool runs_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }                    // ASIMDDP
bool runs_i8mm() { return runs_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }  // I8MM
#elif defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool runs_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool runs_i8mm() { return runs_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#else
bool runs_dotprod() { return false; }
bool runs_i8mm() { return false; }
#endif
#endif

// Get what a table needs of the operating system; it is about to be used.
bool prepares([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx") return request_amx();
#endif
  return true;
}

}  // namespace

// MLF_ISAS is the build's list of tables, best first: X(avx2) X(scalar).
#define X(isa) extern const KernelTable table_##isa;
MLF_ISAS
#undef X

namespace {

struct Entry {
  const KernelTable* table;
  bool (*runs)();
};

const Entry kEntries[] = {
#define X(isa) {&table_##isa, runs_##isa},
    MLF_ISAS
#undef X
};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.push_back(entry.table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries)
    if (entry.runs()) names.push_back(entry.table->name);
  return names;
}

const KernelTable& kernel_table(const std::string& name) {
  if (name.empty()) {
    static const KernelTable& best = []() -> const KernelTable& {
      for (const Entry& entry : kEntries)
        if (entry.runs() && prepares(entry.table->name)) return *entry.table;
      throw std::runtime_error("this machine runs no table of this build");
    }();
    return best;
  }
  std::string known;
  for (const Entry& entry : kEntries) {
    if (name == entry.table->name) {
      if (entry.runs() && prepares(name)) return *entry.table;
      throw std::invalid_argument("isa " + name + " cannot run on this machine");
    }
    known += std::string(known.empty() ? "" : ", ") + entry.table->name;
  }
  throw std::invalid_argument("isa must be one of " + known + ", got " + name);
}

}  // namespace mlf
