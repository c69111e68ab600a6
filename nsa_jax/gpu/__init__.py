"""What is behind implementation="triton": the whole op, its branches, and who runs them on which architecture."""
