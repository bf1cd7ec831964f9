// Choice of a kernel table at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mlf {

// Names of the tables in this build, best first.
std::vector<std::string> compiled_isas();

// Those of them that this processor and operating system can run, best first.
std::vector<std::string> supported_isas();

// The table called `name`, or the best one if it is empty.
// Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
const KernelTable& kernel_table(const std::string& name);

}  // namespace mlf
