"""Data: sources, tasks, batches, what is learned and how it is scored."""
