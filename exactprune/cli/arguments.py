"""Command-line options as frozen dataclasses; the Python API's own options are reused, not repeated.

cyclopts reads names, types, defaults and help from the fields and docstrings, so ``--help`` cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from exactprune.errors import OptionError
from exactprune.options import GIB, CompressOptions, Decider, VerifyOptions, bytes_of

DOMAIN = Group("Domain (the box of inputs; [0, 1] for every input when none is given)", sort_key=1)
VERIFY = Group("Verification", sort_key=2)
COMPRESS = Group("Compression", sort_key=0)
OUTPUT = Group("Input and output", sort_key=3)


def _size(type_: object, tokens: Sequence[Token]) -> int:
    return bytes_of(tokens[0].value)


def _show_size(value: int) -> str:
    return f"{value / GIB:g}G"


def _interval(type_: object, tokens: Sequence[Token]) -> tuple[float, float]:
    text = ",".join(token.value for token in tokens)
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{tokens[0].keyword or 'interval'} is {text!r}; give LO,HI, for example 0,1") from None
    return low, high


def _shape(type_: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    text = ",".join(token.value for token in tokens)
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(f"--input-shape is {text!r}; give positive sizes without batch axis, for example 1,28,28")
    return shape


def _once(converter: Callable[..., object] | None, metavar: str, **settings: Any) -> Parameter:
    return Parameter(converter=converter, metavar=metavar, n_tokens=1, accepts_keys=False, negative="", **settings)


Size = Annotated[int, _once(_size, "SIZE", show_default=_show_size)]
Interval = Annotated[tuple[float, float] | None, _once(_interval, "LO,HI", allow_leading_hyphen=True)]
InputShape = Annotated[tuple[int, ...] | None, _once(_shape, "C,H,W")]
Number = Annotated[float | None, Parameter(allow_leading_hyphen=True)]


@Parameter(name="*", group=DOMAIN)
@dataclass(frozen=True)
class DomainFlags:
    """Where the box of inputs comes from; one way at a time.

    Attributes:
        domain: The same interval for every input.
        domain_box: .npz with arrays lower and upper, flat or in the input's shape.
        vnnlib: VNN-LIB property file; its bounds on the inputs are used.
        center: .npy with the centre of an L-infinity ball; needs --epsilon.
        epsilon: Radius of the ball around --center.
        clip: Cut the ball to this interval.
        domain_data: .npz or .npy with samples; the box is the minimum and maximum of each input.
        margin: Widen the box of --domain-data by this on both sides.
    """

    domain: Interval = None
    domain_box: Path | None = None
    vnnlib: Path | None = None
    center: Path | None = None
    epsilon: Number = None
    clip: Interval = None
    domain_data: Path | None = None
    margin: Number = None


@Parameter(name="*", group=VERIFY)
@dataclass(frozen=True)
class VerifyFlags(VerifyOptions):
    """``VerifyOptions`` with sizes that may carry a unit.

    Attributes:
        decider: What decides open neurons; auto picks by size and measured progress.
        memory: Memory the bound computations may use, for example 2G.
        certificate_cap: Largest certificate file, for example 500M; verdicts that no longer fit are unknown.
    """

    decider: Decider = "auto"
    memory: Size = 2 * GIB
    certificate_cap: Size = 2 * GIB

    @property
    def options(self) -> VerifyOptions:
        """The same as the Python API's own type."""
        return VerifyOptions(**values(self))


@Parameter(name="*", group=COMPRESS)
@dataclass(frozen=True)
class CompressFlags:
    """The fields of ``CompressOptions`` that are not shared with verification.

    Attributes:
        max_deviation: exact (identities only), rounding (at most 2^-20 of the largest output found, float32, or 2^-49,
            float64), or a number: the certified maximum of abs(f - g) over the domain.
        samples: Random points, and as many random corners, on which f and g are compared.
        certificate: Where the certificate bundle goes; OUT.certificate by default.
        preserve: argmax: certify which inputs of --data keep their class; where --max-deviation is rounding, the budget is
            then the largest one with which all of them do, otherwise at most that.
        split: Cut the domain in this many pieces with a smaller network each; OUT is then a folder.
    """

    max_deviation: str = "rounding"
    samples: int = 1000
    certificate: Path | None = None
    preserve: Literal["none", "argmax"] = "none"
    split: int = 1

    def options(self, seed: int) -> CompressOptions:
        """As the Python API's own type."""
        return CompressOptions(self.max_deviation, self.samples, seed, self.preserve)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class ModelFlags:
    """How the model file is read.

    Attributes:
        input_shape: Input shape without batch axis, for example 1,28,28; needed where the file does not say it.
        arch: Architecture of a state_dict file, for example 784-100-10.
        data: .npz or .npy with inputs: tried as witnesses, and f and g are compared on them.
    """

    input_shape: InputShape = None
    arch: str | None = None
    data: Path | None = None


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class OutputFlags:
    """Where results go.

    Attributes:
        output: Run folder; by default the model's stem with .exactprune, in the current directory.
        json: Print the summary (run.json) as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
        resume: Continue an interrupted run from its run folder.
        config: TOML file with the same names in tables [verify] and [compress]; the command line wins.
    """

    output: Path | None = None
    json: Annotated[bool, Parameter(negative="")] = False
    quiet: Annotated[bool, Parameter(negative="")] = False
    resume: Annotated[bool, Parameter(negative="")] = False
    config: Path | None = None


def values(flags: Any) -> dict[str, Any]:
    """Field name -> value of a dataclass, one level deep."""
    return {field.name: getattr(flags, field.name) for field in fields(flags)}
