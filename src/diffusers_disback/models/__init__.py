"""Networks and what they are read from: noise schedules, score models, adapters, weights, references to models."""
