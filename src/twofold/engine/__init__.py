"""Token-in, token-out generation and scoring with the very module that is trained."""
