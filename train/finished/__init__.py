"""A finished run, opened again: to predict, to generate, to export."""
