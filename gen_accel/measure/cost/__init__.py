"""What a run or a training costs, before it: seconds, memory and the speed-up to expect."""
