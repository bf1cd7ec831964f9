// See vec_amx.h.
#pragma once

#include "vec_amx.h"
