"""The degradation path: its nodes, where they are stored, and when each of them is the target."""
