"""What is measured: targets, heads and their training."""
