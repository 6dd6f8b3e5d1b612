"""Latents and text embeddings, encoded once and read while training."""
