"""The exceptions of the package: one line each, naming what was expected and what came."""


class MobileLLMError(ValueError):
    """An argument, a configuration or an input the package cannot work with."""


class CheckpointError(MobileLLMError):
    """A model source (directory, file, hub id) that is missing, damaged or not supported."""
