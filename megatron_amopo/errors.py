"""Errors that are meant for people.

Every message names what to change: the flag, the file and, where there is one, the record. Command lines print them
without a traceback and exit with 2; anything else that escapes is a bug of ours.
"""


class AmopoError(ValueError):
    """Base of all errors whose message is written for the user."""


class ConfigError(AmopoError):
    """A flag, or a combination of flags, that cannot be run."""


class DataError(AmopoError):
    """Preference data, raw or prepared, that cannot be used."""


class CheckpointError(AmopoError):
    """A checkpoint that is missing, incomplete or does not fit."""
