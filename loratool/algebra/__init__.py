"""The mathematics: tensors in, tensors out. No names, no files."""
