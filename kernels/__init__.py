"""GPU kernels, one op per file, and their launchers; installed as `mobilellm_fast.kernels`."""
