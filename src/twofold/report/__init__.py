"""The report of a run: what was claimed, whether it holds, and what it cost, as one HTML page, Markdown and JSON."""
