"""One training loop, many (source, objective) pairs."""
