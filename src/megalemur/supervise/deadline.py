"""When a run has to stop by itself: some time before the batch system ends its job."""

import os

_NAMES = ("MEGALEMUR_JOB_END", "SLURM_JOB_END_TIME")


def job_end() -> float | None:
    """End of the job in seconds since 1970, as the batch script or Slurm says; None where nobody does.

    Raises:
        ValueError: it is no number.
    """
    for name in _NAMES:
        text = os.environ.get(name, "")
        if text:
            if not text.isdigit():
                raise ValueError(f"{name}={text} in the environment is no number of seconds since 1970; unset it")
            return float(text)
    return None


def deadline(stop_before: float | None) -> float | None:
    """When to stop, in seconds since 1970; None for never.

    Args:
        stop_before: seconds before the end of the job; None where nothing is wanted.
    """
    end = job_end() if stop_before is not None else None
    return None if end is None or stop_before is None else end - stop_before
