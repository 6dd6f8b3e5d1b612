"""Videos made: a pipeline loaded, a clip sampled, compared, decoded and written."""
