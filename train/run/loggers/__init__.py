"""The loggers of a run, one module for each kind."""
