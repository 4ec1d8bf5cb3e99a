"""Where the numbers of a run go: one file for each kind of logger."""
