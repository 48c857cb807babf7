"""Post-training: rollouts, rewards, environments, distillation and synthetic data."""
