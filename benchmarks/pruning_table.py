"""Real test loss of pruned networks: methods x sparsities x seeds, after pruning and after the same fine-tuning.

    python benchmarks/pruning_table.py [--seeds 5] [--epochs 10] [--finetune 1] [--samples 1000] [--out FILE]
    python benchmarks/pruning_table.py --write docs/pruners.md      # only the tables, from the recorded numbers

Every seed trains its own dense fashion 784-100-100-10 network; each entry prunes it by 50, 80, 90 and 95 % with the
first --samples training images; then test loss and accuracy, before and after fine-tuning with masks kept (the same data,
options and seed for all). Every row is written as soon as it is measured, and a run goes on where it was interrupted.

Whole-matrix ``obs`` is refused at this size (89,400 weights): the refusal is recorded, and two exact forms of OBS that do
fit stand beside it, under names that say what they are: OBS on the blocks of one neuron each, and layer-wise OBS.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from _pruner_records import into, read_rows, write
from torch import nn

import exactprune
from exactprune.errors import ExactPruneError
from exactprune.training import DataSet, TrainOptions, accuracy, load_data, mean_loss, train

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
PAGE = "five networks"


class Entry(NamedTuple):
    """A method with its options, and the words for it."""

    method: str
    options: dict[str, Any]
    words: str


ENTRIES: dict[str, Entry] = {
    "random": Entry("random", {}, "random weights, all layers together"),
    "magnitude": Entry("magnitude", {}, "abs(w), all layers together"),
    "obd": Entry("obd", {}, "exact diagonal of the Hessian"),
    "obs": Entry("obs", {}, "whole matrix: refused at this size"),
    "obs, by neuron": Entry("obs", {"block": "neuron", "damping": 1e-4},
                            "OBS on the Gauss-Newton blocks of one neuron each, greedy, exact inverses, damping 1e-4"),
    "obs, layer-wise": Entry("obc", {"damping": 0.01},
                             "method obc: exact OBS for each layer's output error, equal sparsity of layers, damping 0.01"),
    "woodfisher": Entry("woodfisher", {}, "empirical Fisher, one block per layer, damping 1e-5, sum of single updates"),
    "woodfisher, joint": Entry("woodfisher", {"update": "joint"}, "the same set of weights, joint update"),
    "cbs": Entry("cbs", {}, "combinatorial selection on the empirical Fisher, joint update, damping 1e-5"),
}


def dense(data: DataSet, seed: int, epochs: int) -> nn.Module:
    """A trained 784-100-100-10 network."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    return train(net, data.x, data.y, TrainOptions(epochs=epochs, seed=seed)).module


def measure(net: nn.Module, data: DataSet, stage: str) -> dict[str, float]:
    x, y = data.x_test, data.y_test
    return {f"loss_{stage}": mean_loss(net, x, y), f"accuracy_{stage}": accuracy(net, x, y)}


def row(net: nn.Module, data: DataSet, entry: Entry, sparsity: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Prune, measure, fine-tune, measure."""
    options = entry.options | ({"seed": seed} if entry.method == "random" else {})
    began = time.process_time()
    try:
        result = exactprune.prune(net, entry.method, sparsity, data.first(given.samples), **options)
    except ExactPruneError as error:
        return {"refused": str(error)}
    cost = {"removed": result.report.removed, "processor_seconds": round(time.process_time() - began, 2)}
    pruned = measure(result.module, data, "pruned")
    tuned = train(result.module, data.x, data.y, tuning(given, seed), masks=result.masks).module
    kept = all(bool((p[~result.masks[n]] == 0).all()) for n, p in tuned.named_parameters() if n in result.masks)
    assert kept, "fine-tuning revived a removed weight"
    return cost | pruned | measure(tuned, data, "tuned")


def tuning(given: argparse.Namespace, seed: int) -> TrainOptions:
    return TrainOptions(epochs=given.finetune, lr=0.01, seed=1000 + seed)


# -- the page ----------------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """One table per sparsity, the lowest mean test loss after pruning first."""
    seeds = sorted({r["seed"] for r in rows})
    unpruned = [r for r in rows if r["method"] == "dense"]
    missing = len(seeds) * len(SPARSITIES) * len(ENTRIES) - sum(r["method"] != "dense" for r in rows)
    text = [f"{missing} of the measurements are missing.\n\n" if missing else "",
            f"Means and standard deviations over {len(seeds)} networks. Unpruned: loss {_cell(unpruned, 'loss_pruned')}, "
            f"accuracy {_percent(unpruned, 'accuracy_pruned')} %.\n"]
    for sparsity in SPARSITIES:
        here = [r for r in rows if r.get("sparsity") == sparsity]
        text.append(f"\n{sparsity:.0%} of the weights removed:\n\n" + _table(here, len(seeds)))
    words = "\n".join(f"- `{name}`: {entry.words}." for name, entry in ENTRIES.items())
    refused = next((r["refused"] for r in rows if r.get("refused")), None)
    return "".join(text) + f"\n{words}\n" + (f"\nThe refusal of `obs`: \"{refused}\".\n" if refused else "")


def _table(rows: list[dict[str, Any]], seeds: int) -> str:
    found = {name: [r for r in rows if r["method"] == name and not r.get("refused")] for name in ENTRIES}
    order = sorted((n for n in found if found[n]), key=lambda n: mean(r["loss_pruned"] for r in found[n]))
    tuned = sorted(order, key=lambda n: mean(r["loss_tuned"] for r in found[n]))
    lines = ["| method | loss after pruning | accuracy % | loss after fine-tuning | accuracy % | place then |",
             "|---|---|---|---|---|---|"]
    for name in order:
        of, some = found[name], "" if len(found[name]) == seeds else f" ({len(found[name])} networks)"
        lines.append(f"| {name}{some} | {_cell(of, 'loss_pruned')} | {_percent(of, 'accuracy_pruned')} | "
                     f"{_cell(of, 'loss_tuned')} | {_percent(of, 'accuracy_tuned')} | {tuned.index(name) + 1} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def _cell(rows: list[dict[str, Any]], name: str) -> str:
    return _spread([r[name] for r in rows], 4)


def _percent(rows: list[dict[str, Any]], name: str) -> str:
    return _spread([100 * r[name] for r in rows], 2)


# -- the run -----------------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that is not recorded yet."""
    data, rows = load_data("fashion-mnist"), read_rows(given.out)
    for seed in range(given.first_seed, given.seeds):
        done = {(r["method"], r["sparsity"]) for r in rows if r["seed"] == seed}
        missing = [(n, s) for s in SPARSITIES for n in ENTRIES if (n, s) not in done]
        if not missing:
            continue
        net = dense(data, seed, given.epochs)
        if ("dense", 0.0) not in done:
            rows.append({"seed": seed, "method": "dense", "sparsity": 0.0} | measure(net, data, "pruned"))
        for name, sparsity in missing:
            found = row(net, data, ENTRIES[name], sparsity, seed, given)
            rows.append({"seed": seed, "method": name, "sparsity": sparsity} | found)
            write(given.out, settings, rows)
            print(rows[-1], flush=True)
    return rows


def _place(key: tuple[int, str, float]) -> tuple[int, float, int]:
    seed, name, sparsity = key
    return seed, sparsity, ["dense", *ENTRIES].index(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="for a second process, with an --out of its own")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="rows of other processes to add")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--finetune", type=int, default=1, help="epochs")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("reports/pruners/table.json"))
    parser.add_argument("--write", type=Path, help="page that gets the tables; nothing is measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"network": "784-100-100-10, ReLU", "data": "fashion-mnist", "seeds": given.seeds, "samples": given.samples,
                "dense": vars(TrainOptions(epochs=given.epochs)), "finetune": vars(tuning(given, 0)) | {"seed": "1000 + seed"},
                "entries": {name: {"method": e.method, "options": e.options} for name, e in ENTRIES.items()}}
    if given.join:
        rows = {(r["seed"], r["method"], r["sparsity"]): r for path in (given.out, *given.join) for r in read_rows(path)}
        write(given.out, settings, [rows[key] for key in sorted(rows, key=_place)])
    rows = read_rows(given.out) if given.write or given.join else run(given, settings)
    text = tables(rows)
    given.out.with_suffix(".md").write_text(text)
    if given.write:
        into(given.write, PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
