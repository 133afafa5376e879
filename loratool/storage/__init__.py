"""Bytes to tensors and back; nothing here knows what LoRA is."""
