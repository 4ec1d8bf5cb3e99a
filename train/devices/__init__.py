"""Meshes and processes: where the arrays of a run are."""
