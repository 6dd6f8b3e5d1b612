"""Videos that every kernel and method is tried on."""

from gen_accel.video import VideoShape

# One shape that divides, one that does not, one with text: the three ways padding goes wrong.
VIDEOS = [VideoShape(4, 8, 8), VideoShape(5, 9, 10), VideoShape(3, 7, 5, text=13)]
