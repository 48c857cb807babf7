"""Runnable recipes: chains of stages with content-hashed artefacts."""
