"""Pipelines of one step. Their files travel with saved models, so they import no other part of this package."""
