"""Every error exactprune raises on misuse; outcomes (proved, refuted, unknown) are values, never exceptions.

Each class names one kind of misuse, so that a caller can tell them apart and the command line can print one line.
All of them end the command line with exit code 2 and nothing written.
"""

from __future__ import annotations


class ExactPruneError(Exception):
    """Base class: the message says what was given, where, and what to do about it."""


class LoadError(ExactPruneError):
    """A model file is missing, empty, truncated, unsafe, or not in the format its name promises."""


class UnsupportedOpError(ExactPruneError):
    """A model uses an operator, or a setting of one, that exactprune has no sound treatment for."""


class WeightError(ExactPruneError):
    """A weight is NaN or infinite, or an array has a shape that does not fit its operator."""


class ShapeError(ExactPruneError):
    """Shapes do not fit together, or a shape is not known (dynamic) where it must be."""


class DomainError(ExactPruneError):
    """A box is empty, unbounded, not finite, or not of the input's size."""


class OptionError(ExactPruneError):
    """An option has a value outside its range, or two options contradict each other."""


class CertificateError(ExactPruneError):
    """A certificate file is malformed (a *wrong* certificate is a rejected verdict, not an error)."""


class SolverError(ExactPruneError):
    """A solver that was asked for is not installed, or refuses the model before it starts."""


class DataError(ExactPruneError):
    """Training or calibration data are missing, empty, of another shape, or give gradients that are not finite."""
