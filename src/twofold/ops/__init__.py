"""Pure functions on tensors: a plain reference for each, and fast twins."""
