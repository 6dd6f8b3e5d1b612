"""Clips of a training: how they are found, captioned, cut and surveyed."""
