"""The Triton kernels, which run on every NVIDIA GPU from sm_80 on and in Triton's interpreter."""
