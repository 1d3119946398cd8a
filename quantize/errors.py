"""The errors a user can meet: each says what was found, what was expected and what to do."""


class MinibbleError(Exception):
    """Base of every error that is about the input or the machine, not about a defect of minibble."""


class ConfigError(MinibbleError):
    """A setting or a `config.json` that cannot be used."""


class CheckpointError(MinibbleError):
    """A checkpoint whose files, names, shapes or values are not what they must be."""


class BudgetError(MinibbleError):
    """More memory is needed than was allowed."""


class CalibrationError(MinibbleError):
    """Calibration data or statistics that cannot be used."""


class StateError(MinibbleError):
    """The state of a sequence that an error left unfinished."""
