"""What a process says when it ends, for the batch script that started it. An error without a code here is ours: 1."""

DONE = 0
"""The command did what was asked; a run that was stopped by a signal has saved."""
USAGE = 2
"""Unknown command or option (typer's own code)."""
BAD_CONFIG = 11
"""Something that a user wrote cannot be used: run file, override, prompt."""
BAD_DATA = 12
"""A data set or tokenizer on disk is missing, damaged or does not fit the model."""
NO_GOOD_CHECKPOINT = 13
"""A checkpoint could not be written, read or fitted to the model."""
NUMERICAL_STOP = 14
"""Too many steps in a row were rejected, and going back to a checkpoint did not help or was not possible."""
REPLICAS_DIFFER = 18
"""What must be equal on several ranks is not; the message names rank and tensor."""
