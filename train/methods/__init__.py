"""Methods of fine-tuning: trained parameters, gradients and updates."""
