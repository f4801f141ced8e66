"""The mathematics: tensors in, tensors out. No model classes, no files, no logging."""
