"""Kernels for Hopper alone, in Gluon and CUDA C++, which ops take where they are faster."""
