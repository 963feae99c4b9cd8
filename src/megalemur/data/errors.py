"""What can be wrong with data on a disk. What a user wrote in a run file is a ValueError instead."""


class DataError(Exception):
    """A data set that cannot be used; the message names the file and says what to do."""


class MissingDataError(DataError):
    """A file of the data set does not exist."""


class DamagedDataError(DataError):
    """A file is there, but it is not what was written."""


class VocabularyError(DataError):
    """Tokens or a tokenizer that do not fit the model."""
