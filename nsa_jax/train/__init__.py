"""Training of an `NSATransformer` on bytes of text: `nsa-train`, or `python -m nsa_jax.train`.

Needs the packages of `nsa-jax[train]`; importing this package does not.
"""
