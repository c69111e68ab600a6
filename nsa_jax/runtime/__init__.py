"""The layer between the ops and the kernels.

device: what kernels are compiled for.
transforms: what JAX's transformations need of a function that launches kernels.
launch: runs a kernel, compiled or interpreted; knows tensor descriptors.
partitioning: which rows and heads of a function that launches kernels each device does, under plain jit.
interpreter: runs a kernel on the CPU, by a Python function that the program calls through host_call.
jax_triton_setup: makes jax_triton fit for use, with the help of
    jax_triton_gluon (kernels written in Gluon), compile_ahead (many at once) and kernel_cache (kept on disk).

Nothing here imports Triton before a kernel is wanted.
"""
