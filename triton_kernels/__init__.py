"""Operators in Triton; installed as `lvlm_fastxai.triton_kernels`. Importing a kernel's module imports triton."""
