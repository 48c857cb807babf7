"""Twofold: one model with two modes, thinking and not thinking, from raw text to served chat."""

__version__ = "0.1.0"
