"""`python -m gen_accel`, as `accelerate launch -m gen_accel` starts it."""

from gen_accel.cli import main

main()
