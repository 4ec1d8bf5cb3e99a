"""Models for the `train` program, and readers of their weights."""
