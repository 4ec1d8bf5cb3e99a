"""Models for the `train` program, and the reading of their weights."""
