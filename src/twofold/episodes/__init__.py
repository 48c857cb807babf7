"""Episodes: queries played through renderer, engine, parser and tools; shared by RL, distillation and evaluation."""
