"""What a device receives: artifacts, their manifest with hashes, and golden inputs and outputs."""
