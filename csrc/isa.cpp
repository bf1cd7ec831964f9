// One table of kernels. Compiled once per ISA with that ISA's flags and -DMLF_ISA=<name>;
// everything but the table has internal linkage, so that no instruction of a better ISA can reach
// the rest of the library through a shared inline function.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace mlf {
namespace {

#include "vec.h"

#include "kernels/rms_norm.h"
#include "kernels/quantize.h"
#include "kernels/group_dot.h"
#include "kernels/tile_dot.h"
#include "kernels/panel_dot.h"
#include "kernels/matrix_dot.h"
#include "kernels/linear.h"
#include "kernels/embed.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"
#include "kernels/page_ahead.h"
#include "kernels/float_page.h"
#include "kernels/page_softmax.h"
#include "kernels/coded_page.h"
#include "kernels/attention.h"
#include "kernels/peak.h"

}  // namespace

extern const KernelTable MLF_JOIN(table_, MLF_ISA);
const KernelTable MLF_JOIN(table_, MLF_ISA) = {MLF_QUOTE(MLF_ISA),
#define X(kernel, ...) kernel,
                                               MLF_KERNELS(X)
#undef X
};

}  // namespace mlf
