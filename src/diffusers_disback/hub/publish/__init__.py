"""Publishes what a run has made: student, path, exports."""
