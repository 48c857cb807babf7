"""The server of OpenAI's and Anthropic's protocols: HTTP in front of one engine, with real control over thinking."""
