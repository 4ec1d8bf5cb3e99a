"""A run: how it is prepared, trained, logged, saved and reported."""
