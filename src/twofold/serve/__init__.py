"""The OpenAI-compatible server: HTTP in front of one engine, with real control over thinking."""
