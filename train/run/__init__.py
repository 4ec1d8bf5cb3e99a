"""One run: prepared, trained, logged, saved and reported."""
