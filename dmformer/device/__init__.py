"""What a machine can run, and whether a bundle will run on it."""
