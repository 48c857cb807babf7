"""The one model definition, its configuration and its weights on disk."""
