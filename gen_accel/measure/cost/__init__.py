"""Cost of a run or a training, before it: seconds, memory and the speed-up to expect."""
