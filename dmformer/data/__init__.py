"""Images in, tensors out: one definition of preprocessing for every runtime, with NumPy and Pillow only."""
