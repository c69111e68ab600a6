"""The kernels for Hopper (sm_90), written in Gluon. See the table in nsa_jax/kernels/__init__.py."""
