"""Triton GPU kernels, one op per file; installed as `mobilellm_fast.kernels`."""
