"""Data: corpora, de-duplication, token shards, packing and the data card. Imports no model."""
