"""The Triton kernels. They import only triton and know nothing of JAX."""
