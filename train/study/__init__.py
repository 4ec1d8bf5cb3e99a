"""Studies: methods x tasks x seeds, under one budget of tuning."""
