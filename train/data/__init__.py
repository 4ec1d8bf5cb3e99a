"""Data: sources, tasks, batches, objectives and scores."""
