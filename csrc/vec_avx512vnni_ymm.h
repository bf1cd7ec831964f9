// See vec_avxvnni.h.
#pragma once

#include "vec_avxvnni.h"
