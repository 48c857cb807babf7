"""Messages to tokens and loss weights, and sampled tokens back to messages; no torch."""
