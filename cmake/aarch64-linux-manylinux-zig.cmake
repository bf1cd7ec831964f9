# Cross-compile with zig (pip install ziglang), for glibc 2.28 and newer.
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
mlf_use_zig(aarch64-linux-gnu.2.28)
