"""What `methods.py` measures: quality on the demo model, of attention and of whole clips."""
