"""Command lines, and how their errors are shown."""
