# Cross-compile with zig (pip install ziglang), for musl: static programs that run on any kernel,
# Android's included. PYTHON names the interpreter that has ziglang.
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
mlf_use_zig(aarch64-linux-musl)
