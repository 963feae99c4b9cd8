"""What can go wrong in a conversion besides a damaged checkpoint."""

from megalemur.checkpoint.errors import CheckpointError


class ConversionError(CheckpointError):
    """A source that is in no known format, or a destination that cannot be made of it."""


class UnfitSource(ConversionError):
    """A source whose files do not fit together: tensors or parts that are missing, too much or of another shape."""


class CertificateError(CheckpointError):
    """What was written is not what was read."""


class RequestError(ValueError):
    """Something that a user wrote cannot be used: an option, a file of prompts, a list of checkpoints."""
