"""Studies: methods x tasks x seeds, with the same tuning budget for all."""
