"""The GPU engine: weights, KV cache and executor in device memory. Needs torch and Triton."""
