"""`python -m nsa_jax.train`."""

import sys

from nsa_jax.train.cli import main

sys.exit(main())
