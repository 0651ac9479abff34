"""One file a technique, grouped by family."""
