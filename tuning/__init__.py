"""What fine-tuning adds to training: mixtures of tasks, loss weights, preference objectives."""
