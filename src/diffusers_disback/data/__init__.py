"""Prompts and their conditions."""
