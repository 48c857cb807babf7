"""Side-by-side measurements: each module is one question, runs both sides in turn and prints ratios."""
