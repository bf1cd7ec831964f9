// Objects of Python that calls without the GIL use.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace mlf {

// Whether a call uses an object now. Such calls run without the GIL, or call Python: another thread
// could copy, replace or move what is being written.
class InUse {
 public:
  explicit InUse(const char* refusal) : refusal_(refusal) {}

  // Refuse other threads' calls. With the GIL held.
  void check() const {
    if (process_ == 0 || process_ != getpid()) return;
    const pybind11::object error =
        pybind11::module_::import("mobilellm_fast.errors").attr("MobileLLMError");
    pybind11::set_error(error, refusal_);
    throw pybind11::error_already_set();
  }

 private:
  friend class Using;

  const char* refusal_;
  int process_ = 0;  // in which it is used, or 0: a child forked meanwhile is without the call
};

// Marks an object while a call uses it. Made and destroyed with the GIL held.
class Using {
 public:
  explicit Using(InUse& in_use) : in_use_(in_use) {
    in_use.check();
    in_use.process_ = getpid();
  }
  Using(const Using&) = delete;
  ~Using() { in_use_.process_ = 0; }

 private:
  InUse& in_use_;
};

}  // namespace mlf
