"""Puts this folder on the path: those below find `problems.py` in it."""
