"""The one exception of this package, apart from the shapes, so that programs without numpy can raise and catch it."""


class CheckpointError(Exception):
    """The files are no usable checkpoint; the text says which file, which tensor and what is wrong."""
