"""Methods of fine-tuning: what is trained, by which gradient and update."""
