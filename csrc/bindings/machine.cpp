// What the machine can do, and its memory.
#include "../checksum.h"
#include "../dispatch.h"
#include "../machine_probe.h"
#include "../memory.h"
#include "../plan.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace mlf {
namespace {

py::array_t<uint8_t> as_array(Pages pages, int64_t nbytes) {
  auto memory = std::make_unique<Pages>(std::move(pages));
  uint8_t* data = memory->get();
  py::capsule owner(memory.release(), [](void* p) { delete static_cast<Pages*>(p); });
  return py::array_t<uint8_t>(nbytes, data, owner);
}

}  // namespace

void bind_machine(py::module_& m) {
  using namespace pybind11::literals;
  // each measures for some milliseconds, without the GIL
  const auto probe = [&m](const char* name, double (*measure)(const KernelTable&, int),
                          const char* doc) {
    m.def(
        name,
        [measure](int threads, const std::string& isa) {
          const KernelTable& kernels = kernel_table(isa);
          check_threads(threads);
          py::gil_scoped_release release;
          return measure(kernels, threads);
        },
        "threads"_a, "isa"_a = "", doc);
  };
  probe("read_bandwidth", read_bandwidth,
        "Bytes per second that `threads` threads read from memory together.");
  probe("int8_peak", int8_peak, "int8 operations per second of registers alone (a product is 2).");
  probe("fp32_peak", fp32_peak, "fp32 operations per second of registers alone (an fma is 2).");
  m.def(
      "cache_bandwidth",
      [](int threads, int64_t nbytes_per_thread, const std::string& isa) {
        const KernelTable& kernels = kernel_table(isa);
        check_threads(threads);
        if (nbytes_per_thread < 1 || nbytes_per_thread > (int64_t{1} << 32))
          throw py::value_error("nbytes_per_thread must be in 1..2^32, got " +
                                std::to_string(nbytes_per_thread));
        py::gil_scoped_release release;
        return cache_bandwidth(kernels, threads, nbytes_per_thread);
      },
      "threads"_a, "nbytes_per_thread"_a, "isa"_a = "",
      "Bytes per second that threads read from caches, each again and again its own buffer.");
  m.def(
      "barrier_seconds",
      [](int threads) {
        check_threads(threads);
        py::gil_scoped_release release;
        return barrier_seconds(threads);
      },
      "threads"_a, "Seconds that a barrier of `threads` running threads takes.");
  m.def("l2_cache_nbytes", &l2_cache_nbytes);
  m.def(
      "allocate",
      [](int64_t nbytes) {
        if (nbytes < 0)
          throw py::value_error("nbytes must not be negative, got " + std::to_string(nbytes));
        return as_array(allocate_pages(nbytes), nbytes);
      },
      "nbytes"_a, "A zeroed uint8 array in huge pages where the system gives them.");
  m.def(
      "map_file",
      [](const std::string& path, const std::string& magic) {
        int64_t nbytes = 0;
        try {
          Pages pages = [&] {
            py::gil_scoped_release release;
            return map_file(path.c_str(), magic, nbytes);
          }();
          return as_array(std::move(pages), nbytes);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, py::bytes(path).ptr());
          throw py::error_already_set();
        }
      },
      "path"_a, "magic"_a,
      "A file as uint8 array, in huge pages likewise; changes stay in this process. One that "
      "begins with `magic` is read at once, if anything of it is cached, so that it comes so.");
  m.def(
      "checksum",
      [](const py::buffer& data, int threads) {
        const py::buffer_info info = data.request();
        check_threads(threads);
        if (!PyBuffer_IsContiguous(info.view(), 'C'))
          throw py::value_error("data must be contiguous");
        py::gil_scoped_release release;
        return checksum(static_cast<const uint8_t*>(info.ptr), info.size * info.itemsize, threads);
      },
      "data"_a, "threads"_a = 1, "64 bits that tell whether any byte changed; not cryptographic.");
  m.def("last_level_cache_nbytes", &last_level_cache_nbytes);
}

}  // namespace mlf
