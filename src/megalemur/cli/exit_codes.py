"""What a process says when it ends."""

DONE = 0
USAGE = 2
BAD_CONFIG = 11
BAD_DATA = 12
NO_GOOD_CHECKPOINT = 13
NUMERICAL_STOP = 14
