"""Plain data and process facts; imports nothing of ours."""
