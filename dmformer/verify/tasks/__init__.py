"""What the answers of each task mean: decisions, accuracy, and how both are compared."""
