"""auto_LiRPA (Xu et al. 2020, https://github.com/Verified-Intelligence/auto_LiRPA) run beside the project, as rival
of benchmarks/bounds.py.

The library is no dependency: the environment variable ``AUTO_LIRPA`` names a checkout (and, after a colon, folders
with what it imports and this environment lacks). Without it the rival's columns stay empty.

It gets the same network (our own conversion to a torch module, in float64), the same box, and the same task: bounds
of every ReLU's pre-activation, by interval bounds first and CROWN for the rows those leave open ("sparse intermediate
bounds"). The output layer is left out on both sides. Every setting that may make it faster is tried, and the fastest
one counts.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exactprune.domain import Box
from exactprune.io import to_torch
from exactprune.network import Network

SETTINGS: dict[str, dict[str, object]] = {
    "patches, sparse": {"conv_mode": "patches"},
    "patches, sparse always": {"conv_mode": "patches", "minimum_sparsity": 1.0},
    "patches, all rows": {"conv_mode": "patches", "sparse_intermediate_bounds": False},
    "matrix, sparse": {"conv_mode": "matrix"},
    "matrix, sparse always": {"conv_mode": "matrix", "minimum_sparsity": 1.0},
    "matrix, all rows": {"conv_mode": "matrix", "sparse_intermediate_bounds": False},
}


def version() -> str | None:
    """Version and commit, or None where ``AUTO_LIRPA`` is not set."""
    if not os.environ.get("AUTO_LIRPA"):
        return None
    paths = os.environ["AUTO_LIRPA"].split(os.pathsep)
    sys.path.extend(p for p in paths if p not in sys.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import auto_LiRPA  # type: ignore[import-not-found]
    git = subprocess.run(["git", "-C", paths[0], "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return f"{auto_LiRPA.__version__} {git.stdout.strip()[:12]}".strip()


@dataclass
class Rival:
    """One network in auto_LiRPA with one setting.

    Attributes:
        setting: key of ``SETTINGS``.
        model: the BoundedModule.
        box: its perturbed input.
    """

    setting: str
    model: Any
    box: Any

    def run(self) -> None:
        """Bounds of every node that a ReLU reads: ``compute_bounds`` up to, not including, the pass for the output."""
        model = self.model
        with torch.no_grad():
            model.compute_bounds(x=(self.box,), method=None)
            model.opt_no_reuse()
            for node in model.nodes():
                node.prior_checked = False
            model.check_prior_bounds(model.final_node())

    def bounds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(lower, upper), flat, of the pre-activation of every ReLU, in the network's order."""
        relus = [n for n in self.model.nodes() if type(n).__name__ == "BoundRelu"]
        return [(r.inputs[0].lower.numpy().reshape(-1), r.inputs[0].upper.numpy().reshape(-1)) for r in relus]

    def whole(self) -> None:
        """The documented entry point, output layer included."""
        with torch.no_grad():
            self.model.compute_bounds(x=(self.box,), method="CROWN")


def rivals(network: Network, box: Box) -> tuple[list[Rival], dict[str, str]]:
    """The network under every setting that works, and why the others do not."""
    has_windows = any(node.op.kind in ("Conv2d", "MaxPool2d", "AvgPool2d") for node in network.nodes)
    wanted = (
        SETTINGS
        if has_windows
        else {k.removeprefix("patches, "): v for k, v in SETTINGS.items() if k.startswith("patches")}
    )
    found, failed = [], {}
    for name, options in wanted.items():
        try:
            rival = _rival(network, box, name, options)
            with contextlib.redirect_stdout(io.StringIO()):
                rival.run()
            found.append(rival)
        except Exception as error:  # a setting that the library cannot do is left out, and reported
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return found, failed


def _rival(network: Network, box: Box, name: str, options: dict[str, object]) -> Rival:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = to_torch(network).double().eval()
            lower, upper = (torch.tensor(t)[None] for t in (box.lower, box.upper))
            middle = (lower + upper) / 2
            model = BoundedModule(module, middle, bound_opts=options, device="cpu")
            model.eval()
            return Rival(
                name, model, BoundedTensor(middle, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper))
            )
    finally:
        torch.set_default_dtype(torch.float32)
