"""What a process says when it ends, for the batch script that started it. An error without a code here is ours: 1."""

DONE = 0
"""The command did what was asked; a run has taken its last step (run.steps or run.stop_at) and saved."""
USAGE = 2
"""Unknown command or option (typer's own code)."""
REQUEUE = 10
"""A signal or the deadline stopped the run; it has saved and wants to be started again: a batch script requeues."""
BAD_CONFIG = 11
"""Something that a user wrote cannot be used: run file, override, prompt."""
BAD_DATA = 12
"""A data set or tokenizer on disk is missing, damaged or does not fit the model."""
NO_GOOD_CHECKPOINT = 13
"""A checkpoint could not be written, read or fitted to the model."""
NUMERICAL_STOP = 14
"""Too many steps in a row were rejected, and going back to a checkpoint did not help or was not possible."""
HANG = 15
"""A rank made no progress for too long; the message names it."""
CRASH_LOOP = 16
"""The run was started several times in a row from the same step and never got to another checkpoint."""
RANK_DIED = 17
"""A rank was killed or crashed; the others were ended. The message names it."""
STOPPED_TWICE = 18
"""A second signal ended the run at once, without a save; its last checkpoint is as it was."""
REPLICAS_DIFFER = 19
"""What must be equal on several ranks is not; the message names rank and tensor."""
DOES_NOT_FIT = 20
"""`megalemur plan`: a stage needs more memory than a GPU of the cluster has, or no layout of a search fits."""
