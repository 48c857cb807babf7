"""Tasks: items, prompts and verifiers that evaluation and reward share. Imports no torch."""
