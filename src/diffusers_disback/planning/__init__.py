"""Predicts the memory of a run."""
