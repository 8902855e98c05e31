"""The small real corpus: synthesised speech, emoji pictures, MNIST and library documentation, from PyPI alone."""
