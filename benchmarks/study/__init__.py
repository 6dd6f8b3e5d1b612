"""Measurements of `methods.py`: quality on the demo model, of attention and of whole clips."""
