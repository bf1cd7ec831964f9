// The products are among the primitives.
#pragma once
