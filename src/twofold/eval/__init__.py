"""Measuring checkpoints: statistics and evaluation runs."""
