"""Training and evaluation in several processes started by torchrun: process group, agreement, DDP."""
