"""Witnesses of instability: points of the box where a pre-activation is > 0, and where one is < 0.

Points come from data, from random mixtures (uniform points, and corners of every density), from corners in closed form
where a pre-activation is affine in the input, and from gradient ascent batched over (neuron, sign, restart). Every
batch that is evaluated is searched for signs of *all* neurons that still lack one.

Ascent replaces the derivative of ReLU by ``sigmoid(z_hat / t)`` in the backward pass only (a surrogate gradient; Neftci
et al., IEEE Signal Processing Magazine 36, 2019): the true derivative is 0 behind every inactive neuron, so plain
projected gradient steps die exactly where a neuron still has to be switched on. The temperature t falls from step to
step, until the slope is nearly the true one. Steps are signed steps with momentum and decreasing length, or Frank-Wolfe
steps (Frank and Wolfe, 1956) towards the corner of the box that the gradient points to. Temperatures, lengths and
momentum are drawn afresh for every start.

Why sound: a sign is recorded only when abs(z_hat) in float64 exceeds a bound on its error
(``exactprune.bounds.forward``) or exact rationals confirm it, and only at a point that lies in the box, compared as
float64 without tolerance. How a point was found does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.forward import Activation, Forward, certain_sign, exact_cost, exact_preactivation
from exactprune.claim import Method
from exactprune.domain import Box
from exactprune.errors import OptionError
from exactprune.network import INPUT, Network
from exactprune.ops import MaxPool2d, ReLU, frozen

Masks = tuple[np.ndarray, np.ndarray]
Progress = Callable[[int], None]

GRID_BITS = 14
CHUNK = {"cpu": 512, "cuda": 8192}
POOL = 256
FIRST_SAMPLES = 64
COVER_LIMIT = 1 << 26
ALL_CORNERS = 12
SAMPLE_FLOPS = 5e10  # of evaluating random points, and of evaluating corners beyond their own layer, at most
EXACT_PRODUCTS = 20_000_000  # of Python integers, that settling signs exactly may take in total: some seconds
HOT_COLD_LONG_SHORT = ((-3.0, 0.5), (-3.0, 0.0), (-1.0, 0.0), (-3.0, -1.3))


@dataclass(frozen=True, eq=False)
class Witnesses:
    """What a search has found; immutable.

    Attributes:
        points: float64 of shape (points, inputs), every one in the box; only points that witness something.
        positive: a layer each, int64 of shape (neurons,): number of a point where the pre-activation is > 0, or -1.
        negative: the same for < 0.
        positive_method, negative_method: a layer each, int8 of shape (neurons,), values of ``Method``.
    """

    points: np.ndarray
    positive: tuple[np.ndarray, ...]
    negative: tuple[np.ndarray, ...]
    positive_method: tuple[np.ndarray, ...]
    negative_method: tuple[np.ndarray, ...]

    def unstable(self, layer: int) -> np.ndarray:
        """Which neurons of a ReLU layer have witnesses of both signs: booleans of shape (neurons,)."""
        return (self.positive[layer] >= 0) & (self.negative[layer] >= 0)

    def method(self, layer: int) -> np.ndarray:
        """The later of the two methods that settled a neuron as unstable, ``Method.NONE`` elsewhere; int8."""
        later = np.maximum(self.positive_method[layer], self.negative_method[layer])
        return np.where(self.unstable(layer), later, np.int8(Method.NONE)).astype(np.int8)


class _SurrogateReLU(torch.autograd.Function):
    """ReLU forward; backward with slope sigmoid(z_hat / temperature)."""

    @staticmethod
    def forward(ctx: Any, z_hat: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(z_hat, temperature)
        return z_hat.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z_hat, temperature = ctx.saved_tensors
        return grads[0] * torch.sigmoid(z_hat / temperature), None


def surrogate(relative: Tensor) -> Activation:
    """ReLU with a surrogate slope whose temperature is ``relative`` (batch,) times the mean magnitude of the layer."""

    def activation(z_hat: Tensor) -> Tensor:
        rows = (-1, *[1] * (z_hat.ndim - 1))
        size = z_hat.detach().abs().flatten(1).mean(1).clamp_min(1e-30) * relative
        result: Any = _SurrogateReLU.apply(z_hat, size.reshape(rows))
        return result

    return activation


@dataclass(eq=False)
class _Ledger:
    """One ReLU layer and one sign: which neurons still need a witness, and the witnesses found.

    Attributes:
        sign: +1 or -1.
        error: bound on the float64 error, valid on the box, of shape (neurons,).
        need: on the device, booleans of shape (neurons,).
        tried: the largest sign * z_hat that a closer look has been spent on in vain.
        point, method: number of the witness (-1: none) and how it was found.
    """

    layer: int
    sign: int
    error: Tensor
    need: Tensor
    tried: Tensor
    point: np.ndarray
    method: np.ndarray

    def open_indices(self) -> Tensor:
        return self.need.nonzero()[:, 0]

    def record(self, indices: np.ndarray, point: int, method: Method) -> None:
        self.point[indices] = point
        self.method[indices] = method
        self.need[torch.as_tensor(indices, device=self.need.device)] = False


_Doubt = tuple[_Ledger, Tensor, Tensor]  # neurons, and the row of a batch where each takes its largest value


def _ledger(layer: int, sign: int, error: Tensor) -> _Ledger:
    n = error.numel()
    need = torch.ones(n, dtype=torch.bool, device=error.device)
    return _Ledger(layer, sign, error, need, torch.zeros_like(error), np.full(n, -1, np.int64), np.zeros(n, np.int8))


@dataclass(frozen=True, eq=False)
class _Climbers:
    """Rows of an ascent; every tensor has one entry a row.

    Attributes:
        neuron, sign: what the row works for: a large ``sign * z_hat`` of ``neuron``.
        x, velocity: the point, and the running average of its gradients, (rows, inputs).
        hot, cold: first and last temperature of the surrogate slope, in mean magnitudes of a layer.
        long, short: first and last length of a step, in widths of the box.
        momentum: what remains of ``velocity`` from step to step.
        frank_wolfe: step towards the gradient's corner instead of along its signs.
    """

    neuron: Tensor
    sign: Tensor
    x: Tensor
    velocity: Tensor
    hot: Tensor
    cold: Tensor
    long: Tensor
    short: Tensor
    momentum: Tensor
    frank_wolfe: Tensor

    def select(self, rows: Tensor) -> _Climbers:
        """Some of the rows, in order."""
        return self if bool(rows.all()) else _Climbers(*(getattr(self, f.name)[rows] for f in fields(self)))

    def temperature(self, progress: float) -> Tensor:
        """Geometric between ``hot`` at progress 0 and ``cold`` at 1."""
        return self.hot * (self.cold / self.hot) ** progress

    def length(self, progress: float) -> Tensor:
        """Geometric between ``long`` and ``short``, as a column."""
        return (self.long * (self.short / self.long) ** progress)[:, None]


def greedy_cover(covers: Tensor) -> list[tuple[int, Tensor]]:
    """Rows that together cover every column, largest gain first (Chvatal's greedy set cover).

    Args:
        covers: booleans of shape (rows, columns), every column covered by some row.

    Returns:
        (row, the columns it is chosen for) pairs; every column appears once.
    """
    left = torch.arange(covers.shape[1], device=covers.device)
    chosen: list[tuple[int, Tensor]] = []
    while left.numel():
        row = int(covers.sum(dim=1).argmax())
        hit = covers[row]
        if not bool(hit.any()):
            break
        chosen.append((row, left[hit]))
        left, covers = left[~hit], covers[:, ~hit]
    return chosen


class WitnessSearch:
    """Accumulates witnesses for one network on one box.

    Args:
        network: any network.
        box: of the network's input size.
        device: for example ``cpu`` or ``cuda``; ignored when ``forward`` is given.
        seed: of every random choice.
        forward: shared forward pass, to spare a second copy of the weights.
        memory: bytes that one batch may take.
        exact_limit: how many signs may be settled in exact arithmetic in total (it is slow).

    Raises:
        DomainError: the box has another size.
        OptionError: ``memory`` is not positive.
    """

    def __init__(self, network: Network, box: Box, *, device: str | torch.device = "cpu", seed: int = 0,
                 forward: Forward | None = None, memory: int = 1 << 29, exact_limit: int = 256) -> None:
        if memory <= 0:
            raise OptionError(f"memory is {memory} bytes; give a positive number")
        self.network = network
        self.box = box.reshaped(network.input_shape)
        self.forward = forward or Forward(network, device)
        self.memory = memory
        self._rng = np.random.default_rng(seed)
        self._exact_left, self._products_left = exact_limit, EXACT_PRODUCTS
        self._exact_costs: dict[int, int] = {}
        self._lower = self.forward.tensor(self.box.lower[None])[0]
        self._upper = self.forward.tensor(self.box.upper[None])[0]
        width = self._upper - self._lower
        exponent = torch.frexp(torch.where(width > 0, width, 1.0))[1].to(torch.float64) - GRID_BITS
        self._grid = torch.exp2(exponent.clamp(-1000, 1000))
        errors = self.forward.box_errors(self.box)
        self._ledgers = [(_ledger(k, 1, e), _ledger(k, -1, e)) for k, e in enumerate(errors)]
        self._points: list[np.ndarray] = []

    # -- state ---------------------------------------------------------------------------------------------------------

    def lacking(self, layer: int) -> Masks:
        """Which neurons of a ReLU layer lack a positive and a negative witness (ruled out ones do not lack it)."""
        positive, negative = self._ledgers[layer]
        return positive.need.cpu().numpy(), negative.need.cpu().numpy()

    def methods(self, layer: int) -> np.ndarray:
        """The later of the two methods that found a layer's witnesses, where both signs have one, else 0; int8."""
        positive, negative = self._ledgers[layer]
        both = (positive.point >= 0) & (negative.point >= 0)
        return np.where(both, np.maximum(positive.method, negative.method), 0).astype(np.int8)

    def missing(self) -> int:
        """How many witnesses are still lacking in all layers."""
        return sum(int(ledger.need.sum()) for pair in self._ledgers for ledger in pair)

    def rule_out(self, layer: int, positive: np.ndarray, negative: np.ndarray) -> None:
        """Stop looking for signs that are proved impossible (or no longer matter).

        Args:
            layer: number of the ReLU layer.
            positive, negative: booleans of shape (neurons,): no witness > 0 (resp. < 0) is needed here.
        """
        for ledger, mask in zip(self._ledgers[layer], (positive, negative), strict=True):
            ledger.need &= ~torch.as_tensor(np.asarray(mask, bool).reshape(-1), device=ledger.need.device)

    def snapshot(self) -> Witnesses:
        """What is known now, on as few points as a greedy cover needs."""
        rows = self._cover()
        used = sorted({int(r) for row in rows for r in row if r >= 0})
        place = np.full(len(self._points) + 1, -1, np.int64)
        place[used] = np.arange(len(used))
        points = np.array([self._points[r] for r in used]).reshape(len(used), self.forward.inputs)
        numbered = [frozen(place[row]) for row in rows]
        methods = [frozen(ledger.method) for pair in self._ledgers for ledger in pair]
        return Witnesses(frozen(points), tuple(numbered[0::2]), tuple(numbered[1::2]), tuple(methods[0::2]),
                         tuple(methods[1::2]))

    def _cover(self) -> list[np.ndarray]:
        """Number of a stored point for every ledger and neuron (-1: none): few different ones in total."""
        ledgers = [ledger for pair in self._ledgers for ledger in pair]
        owner = np.concatenate([ledger.point for ledger in ledgers]) if ledgers else np.empty(0, np.int64)
        columns = np.flatnonzero(owner >= 0)
        if len(self._points) * len(columns) > min(self.memory, COVER_LIMIT):
            return [ledger.point for ledger in ledgers]
        covers = torch.zeros((len(self._points), len(columns)), dtype=torch.bool)
        rows = self._rows(None)
        for start in range(0, len(self._points), rows):
            covers[start:start + rows] = self._certain(np.array(self._points[start:start + rows]))[:, columns]
        covers[owner[columns], torch.arange(len(columns))] = True
        for row, chosen in greedy_cover(covers):
            owner[columns[chosen.numpy()]] = row
        ends = np.cumsum([ledger.point.size for ledger in ledgers])[:-1]
        return np.split(owner, ends)

    @torch.no_grad()
    def _certain(self, x: np.ndarray) -> Tensor:
        """Booleans (batch, neurons of all ledgers): which signs these points witness beyond the box's error bound."""
        values = self.forward.preactivations(x)
        signs = [certain_sign(z, pair[0].error) for z, pair in zip(values, self._ledgers, strict=True)]
        return torch.cat([s == sign for s in signs for sign in (1, -1)], dim=1).cpu()

    # -- cheap sources of points ---------------------------------------------------------------------------------------

    def try_points(self, x: np.ndarray | Tensor, method: Method = Method.SAMPLE, layers: int | None = None) -> int:
        """Evaluates points and records the certain signs that were still lacking.

        Args:
            x: shape (batch, inputs) or (batch, *input shape); points outside the box are left out.
            method: what to note as the source.
            layers: look at the first so many ReLU layers only (all by default).

        Returns:
            number of new witnesses.
        """
        points = self.forward.tensor(x)
        points = points[((points >= self._lower) & (points <= self._upper)).all(dim=1)]
        last = None if layers is None else layers - 1
        if not self._ledgers or layers == 0 or not len(points):
            return 0
        with torch.no_grad():
            return sum(self._harvest(self.forward.preactivations(part, last), part, method)
                       for part in points.split(self._rows(last)))

    def data(self, x: np.ndarray) -> int:
        """Data clipped to the box: first rounded to few bits, then as it is. Returns the number of new witnesses."""
        points = self._clip(self.forward.tensor(x))
        return self.try_points(self.quantise(points), Method.DATA) + self.try_points(points, Method.DATA)

    def sample(self, count: int = 1024) -> int:
        """Random points (see ``random_points``), at most ``count`` (fewer in large networks).

        They come in growing batches until one shows nothing new. Few inputs: all corners too. Returns the number of new
        witnesses.
        """
        found = 0
        if self.forward.inputs <= ALL_CORNERS:
            found = self.try_points(self._all_corners(), Method.SAMPLE)
        count = min(count, max(FIRST_SAMPLES, int(SAMPLE_FLOPS / (2 * self.network.macs + 1))))
        done, size, fresh = 0, FIRST_SAMPLES, 1
        while done < count and fresh and self.missing():
            size = min(size, count - done)
            fresh = self.try_points(self.random_points(size), Method.SAMPLE)
            found, done, size = found + fresh, done + size, min(2 * size, self._rows(None))
        return found

    def random_points(self, count: int) -> Tensor:
        """A mixture: a quarter uniform, half random corners, a quarter corners whose upper ends are uniform instead.

        The density of upper ends is drawn per point from a law that likes 0 and 1 (an arcsine law): sparse and dense
        corners reach signs that a fair coin does not.
        """
        kind = self._rng.random((count, 1))
        density = np.sin(np.pi / 2 * self._rng.random((count, 1))) ** 2
        uniform = self._rng.random((count, self.forward.inputs))
        corner = (self._rng.random(uniform.shape) < density).astype(np.float64)
        share = np.where(kind < 0.25, uniform, np.where(kind < 0.75, corner, corner * uniform))
        return self._between(torch.as_tensor(share, device=self._lower.device))

    def corners(self, progress: Progress | None = None) -> int:
        """The maximising and minimising corner of every open neuron whose pre-activation is affine in the input.

        Exact there: a neuron without a witness afterwards does not take that sign, but for signs of coefficients lost
        to rounding where several affine operators follow each other. ``progress`` is called with the number of neurons after
        every batch. Returns the number of new witnesses.
        """
        return sum(self._layer_corners(k, side, progress) for k in self._affine_layers() for side in (0, 1))

    def corner_targets(self) -> int:
        """How many neurons and signs ``corners`` would look at."""
        return sum(int(ledger.need.sum()) for k in self._affine_layers() for ledger in self._ledgers[k])

    def _layer_corners(self, layer: int, side: int, progress: Progress | None) -> int:
        ledger, found, left = self._ledgers[layer][side], 0, SAMPLE_FLOPS
        order = ledger.open_indices()
        for batch in order.split(self._rows(layer)):
            if progress:
                progress(len(batch))
            part = batch[ledger.need[batch]]
            if part.numel():
                ascent = _packed(self._rows_of_affine(layer, part) * ledger.sign)
                found += self.try_points(torch.where(ascent > 0, self._upper, self._lower), Method.CORNER,
                                         None if left > 0 else layer + 1)
                left -= 2.0 * self.network.macs * len(ascent)
        return found

    def _rows_of_affine(self, layer: int, indices: Tensor) -> Tensor:
        """Gradients of pre-activations that are affine in the input, (len(indices), inputs)."""
        x = self._lower.expand(indices.numel(), -1).clone().requires_grad_()
        z_hat = self.forward.preactivations(x, layer)[layer]
        return torch.autograd.grad(z_hat.gather(1, indices[:, None]).sum(), x)[0]

    def _affine_layers(self) -> list[int]:
        bent: set[int] = set()
        for i, node in enumerate(self.network.nodes):
            if isinstance(node.op, (ReLU, MaxPool2d)) or bent.intersection(node.inputs):
                bent.add(i)
        inputs = [self.network.nodes[i].inputs[0] for i in self.network.relus]
        return [k for k, source in enumerate(inputs) if source == INPUT or source not in bent]

    # -- ascent --------------------------------------------------------------------------------------------------------

    def ascent(self, open: Sequence[Masks] | None = None, *, steps: int = 20, restarts: int = 4, rounds: int = 5,
               first: int = 0, time_limit: float | None = None, patience: int | None = None,
               progress: Progress | None = None) -> int:
        """Gradient ascent with a surrogate slope for every neuron and sign that lacks a witness.

        Round t makes ``restarts * 2^t`` starts (16 times at most) of ``steps * (1 + t)`` steps (4 times at most) for
        each, so easy witnesses are cheap and hard ones still found. A round of full effort without news ends it.

        Args:
            open: per ReLU layer (positive, negative) booleans of shape (neurons,): work only on these (all by default).
            steps: of a start in round 0.
            restarts: per neuron and sign in round 0.
            rounds: at most.
            first: number of the first round, to go on where an earlier call ended.
            time_limit: seconds after which it ends (results then depend on the machine's speed).
            patience: so many targets of a layer in a row without a witness, and the rest of it is left. The most promising
                come first: those whose best known value is nearest to the sign wanted, in standard deviations.
            progress: called with the number of targets after every batch of them.

        Returns:
            number of new witnesses.
        """
        end = perf_counter() + (np.inf if time_limit is None else time_limit)
        found = 0
        for turn in range(first, first + rounds):
            before = found
            for layer in range(len(self._ledgers)):
                found += self._ascend_layer(layer, open[layer] if open else None, steps * min(1 + turn, 4),
                                            restarts << min(turn, 4), end, patience, progress)
            if (turn >= 4 and found == before) or perf_counter() > end or not self.missing():
                break
        return found

    def _wanted(self, layer: int, masks: Masks | None) -> tuple[Tensor, Tensor]:
        """(neurons, signs) that lack a witness and are wanted."""
        neurons, signs = [], []
        for side, ledger in enumerate(self._ledgers[layer]):
            need = ledger.need
            if masks is not None:
                need = need & torch.as_tensor(np.array(masks[side], bool).reshape(-1), device=need.device)
            neurons.append(need.nonzero()[:, 0])
            signs.append(torch.full_like(neurons[-1], ledger.sign))
        return torch.cat(neurons), torch.cat(signs)

    def _ascend_layer(self, layer: int, masks: Masks | None, steps: int, restarts: int, end: float, patience: int | None,
                      progress: Progress | None) -> int:
        neurons, signs = self._wanted(layer, masks)
        if not neurons.numel():
            return 0
        pool, found, barren = self._pool(), 0, 0
        with torch.no_grad():
            scores = self.forward.preactivations(pool, layer)[layer]
        order = torch.arange(neurons.numel(), device=neurons.device)
        if patience is not None:
            order = _promise(scores, neurons, signs).argsort(descending=True, stable=True)
        for part in order.split(max(1, self._rows(layer) // restarts)):
            neuron, sign = neurons[part], signs[part]
            still = self._needed(layer, neuron, sign)
            neuron, sign = neuron[still], sign[still]
            if perf_counter() > end or (patience is not None and barren >= patience):
                break
            if neuron.numel():
                fresh = self._climb(layer, self._climbers(neuron, sign, scores, pool, restarts), steps, end)
                found, barren = found + fresh, 0 if fresh else barren + neuron.numel()
            if progress:
                progress(part.numel())
        return found

    def _needed(self, layer: int, neuron: Tensor, sign: Tensor) -> Tensor:
        positive, negative = self._ledgers[layer]
        return torch.where(sign > 0, positive.need[neuron], negative.need[neuron])

    def _pool(self) -> Tensor:
        """Points to start from: random ones and those already known to witness something."""
        known = self._points[-2 * POOL:]
        fresh = self.random_points(min(POOL, self._rows(None)))
        return torch.cat([fresh, self.forward.tensor(np.array(known))]) if known else fresh

    def _climbers(self, neuron: Tensor, sign: Tensor, scores: Tensor, pool: Tensor, restarts: int) -> _Climbers:
        """``restarts`` rows a target: half from the best of the pool, half from random points; schedules at random.

        No one schedule finds every witness, and which one does differs from neuron to neuron: measured on 21 hard
        neurons, each was found by some of 384 random schedules and missed by most, and by every fixed one on some.
        """
        count = neuron.numel()
        best = (scores[:, neuron] * sign).topk(min((restarts + 1) // 2, len(pool)), dim=0).indices.reshape(-1)
        fresh = self.random_points(restarts * count - len(best))
        x = torch.cat([pool[best], fresh])
        hot, cold, long, short = (10 ** self._draw(len(x), *span) for span in HOT_COLD_LONG_SHORT)
        momentum = 1 - 10 ** self._draw(len(x), -1, 0)
        frank_wolfe = self._draw(len(x), 0, 1) < 0.25
        return _Climbers(neuron.repeat(restarts), sign.repeat(restarts), x, torch.zeros_like(x), hot, hot * cold, long,
                         short, momentum[:, None], frank_wolfe[:, None])

    def _draw(self, count: int, low: float, high: float) -> Tensor:
        return torch.as_tensor(self._rng.uniform(low, high, count), device=self._lower.device)

    def _climb(self, layer: int, rows: _Climbers, steps: int, end: float) -> int:
        """Runs one batch of ascents; returns the number of new witnesses in all layers up to ``layer``."""
        found = 0
        for step in range(steps):
            progress = step / max(steps - 1, 1)
            x = rows.x.detach().requires_grad_()
            values = self.forward.preactivations(x, layer, activation=surrogate(rows.temperature(progress)))
            found += self._harvest([z.detach() for z in values], x.detach(), Method.ASCENT)
            objective = values[layer].gather(1, rows.neuron[:, None])[:, 0] * rows.sign
            slope = torch.autograd.grad(objective.sum(), x)[0]
            rows = self._move(rows, slope, progress).select(self._needed(layer, rows.neuron, rows.sign))
            if not rows.neuron.numel() or perf_counter() > end:
                return found
        return found + self.try_points(rows.x, Method.ASCENT, layer + 1)

    def _move(self, rows: _Climbers, slope: Tensor, progress: float) -> _Climbers:
        width = self._upper - self._lower
        slope = slope * width
        slope = slope / slope.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
        velocity = (rows.momentum * rows.velocity + slope).nan_to_num(0.0)
        length = rows.length(progress)
        corner = torch.where(velocity > 0, self._upper, torch.where(velocity < 0, self._lower, rows.x))
        share = (2 * length).clamp_max(1)
        jump = torch.where(share == 1, corner, rows.x + (corner - rows.x) * share)
        walk = rows.x + velocity.sign() * (width * length)
        x = self.quantise(self._clip(torch.where(rows.frank_wolfe, jump, walk)))
        return replace(rows, x=x, velocity=velocity)

    # -- points --------------------------------------------------------------------------------------------------------

    def quantise(self, x: Tensor) -> Tensor:
        """Points of the box on a dyadic grid of about 2^-14 of its width; endpoints stay as they are."""
        rounded = self._clip((x / self._grid).round() * self._grid)
        return torch.where((x <= self._lower) | (x >= self._upper), x, rounded)

    def _clip(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self._lower), self._upper)

    def _between(self, share: Tensor) -> Tensor:
        """Points from shares in [0, 1]; 0 and 1 give the endpoints exactly."""
        inner = self.quantise(self._clip(self._lower + share * (self._upper - self._lower)))
        return torch.where(share == 0, self._lower, torch.where(share == 1, self._upper, inner))

    def _all_corners(self) -> Tensor:
        n = self.forward.inputs
        bits = np.arange(1 << n)[:, None] >> np.arange(n) & 1
        return torch.where(torch.as_tensor(bits == 1, device=self._lower.device), self._upper, self._lower)

    def _rows(self, last: int | None) -> int:
        chunk = CHUNK.get(self._lower.device.type, 512)
        return int(max(1, min(chunk, self.memory // (32 * self.forward.width(last)))))

    # -- recording -----------------------------------------------------------------------------------------------------

    def _harvest(self, values: Sequence[Tensor], x: Tensor, method: Method) -> int:
        """Records certain signs of a batch; returns how many are new."""
        hits: list[Tensor] = []
        owners: list[tuple[_Ledger, Tensor]] = []
        doubtful: list[_Doubt] = []
        if not len(x):
            return 0
        for z_hat, pair in zip(values, self._ledgers, strict=False):
            for ledger in pair:
                index = ledger.open_indices()
                if not index.numel():
                    continue
                signed = z_hat[:, index] * ledger.sign
                top, row = signed.max(dim=0)
                sure = (top > ledger.error[index]) & top.isfinite()
                if bool(sure.any()):
                    hits.append((signed[:, sure] > ledger.error[index[sure]]) & signed[:, sure].isfinite())
                    owners.append((ledger, index[sure]))
                unsure = ~sure & (top > ledger.tried[index]) & top.isfinite()
                if bool(unsure.any()):
                    doubtful.append((ledger, index[unsure], row[unsure]))
        found = self._record(hits, owners, x, method) if hits else 0
        return found + (self._settle(doubtful, x, method) if doubtful else 0)

    def _record(self, hits: list[Tensor], owners: list[tuple[_Ledger, Tensor]], x: Tensor, method: Method) -> int:
        ledger_of = np.repeat(np.arange(len(owners)), [index.numel() for _, index in owners])
        neuron_of = torch.cat([index for _, index in owners]).cpu().numpy()
        for row, columns in greedy_cover(torch.cat(hits, dim=1)):
            point = self._store(x[row])
            chosen = columns.cpu().numpy()
            for number in np.unique(ledger_of[chosen]):
                owners[number][0].record(neuron_of[chosen[ledger_of[chosen] == number]], point, method)
        return len(neuron_of)

    def _store(self, x: Tensor) -> int:
        self._points.append(x.detach().cpu().numpy().copy())
        return len(self._points) - 1

    def _settle(self, doubtful: Sequence[_Doubt], x: Tensor, method: Method) -> int:
        """Signs that the error bound for the whole box leaves open: the bound at the point, then exact arithmetic."""
        used = torch.cat([row for _, _, row in doubtful]).unique()
        values, errors = self.forward.with_errors(x[used], max(ledger.layer for ledger, _, _ in doubtful))
        hits: list[Tensor] = []
        owners: list[tuple[_Ledger, Tensor]] = []
        rest: list[_Doubt] = []
        for ledger, index, row in doubtful:
            signed = values[ledger.layer][:, index] * ledger.sign
            best = signed.gather(0, torch.searchsorted(used, row)[None])[0]
            ledger.tried[index] = torch.maximum(ledger.tried[index], best.nan_to_num(torch.inf))
            certain = (signed > errors[ledger.layer][:, index]) & signed.isfinite()
            sure = certain.any(dim=0)
            hits.append(certain[:, sure])
            owners.append((ledger, index[sure]))
            rest.append((ledger, index[~sure], row[~sure]))
        return self._record(hits, owners, x[used], method) + sum(self._confirm(*item, x, method) for item in rest)

    def _confirm(self, ledger: _Ledger, index: Tensor, row: Tensor, x: Tensor, method: Method) -> int:
        """Exact arithmetic for single signs, while there is effort left for it."""
        found = 0
        for i in range(index.numel()):
            if not self._affords(ledger.layer):
                break
            if self._confirmed(ledger, int(index[i]), x[row[i]]):
                ledger.record(index[i:i + 1].cpu().numpy(), self._store(x[row[i]]), method)
                found += 1
        return found

    def _affords(self, layer: int) -> bool:
        if layer not in self._exact_costs:
            self._exact_costs[layer] = exact_cost(self.network, layer)
        return self._exact_left > 0 and self._exact_costs[layer] <= self._products_left

    def _confirmed(self, ledger: _Ledger, neuron: int, x: Tensor) -> bool:
        self._exact_left, self._products_left = self._exact_left - 1, self._products_left - self._exact_costs[ledger.layer]
        return exact_preactivation(self.network, x.cpu().numpy(), ledger.layer, neuron) * ledger.sign > 0


def _promise(scores: Tensor, neurons: Tensor, signs: Tensor) -> Tensor:
    """The largest value of the sign wanted among some points, in standard deviations; scores (points, neurons of the layer)."""
    signed = scores[:, neurons] * signs
    return signed.amax(dim=0) / signed.std(dim=0, correction=0).clamp_min(1e-300)


def _packed(rows: Tensor) -> Tensor:
    """Rows with disjoint supports added up (neurons of a convolution that see different places share a corner)."""
    support = rows != 0
    if rows.shape[0] < 2 or float(support.double().mean()) > 0.25:
        return rows
    packed: list[Tensor] = []
    left = list(range(rows.shape[0]))
    while left:
        total, used, later = rows[left[0]].clone(), support[left[0]].clone(), []
        for r in left[1:]:
            if bool((used & support[r]).any()):
                later.append(r)
            else:
                total += rows[r]
                used |= support[r]
        packed.append(total)
        left = later
    return torch.stack(packed)
