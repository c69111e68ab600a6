"""What the attention layers compute once the projections are there: shared by `nsa_jax.linen` and `nsa_jax.nnx`."""
