"""Generation of videos: load a pipeline, sample a clip, compare, decode and write it."""
