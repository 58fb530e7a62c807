"""The project's own study: what is removed without a trace, what approximate methods do, and what of that is proved.

    python benchmarks/study.py                       # everything; cells that exist are read
    python benchmarks/study.py --only sweep,page     # parts: sweep, networks, compare, equiv, readme, page
    python benchmarks/study.py --only compare:fashion_2x800    # one experiment of reports/study/compare

Results go to reports/study/: index.md and index.html to read, CSV and JSON beside them, one JSON file a cell. Needs Debian's
dataset-fashion-mnist; networks of the shared folder (EXACTPRUNE_SHARED) are left out, with a reason, where it is missing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _study_cells import OUT, ROOT, Cells, Facts
from _study_compare import compare, experiments, results
from _study_equiv import equiv_cells
from _study_networks import network_cells
from _study_page import write, write_csv, write_page
from _study_sweep import SWEEPS, sweep_cells
from _study_tables import compare_sections, networks_section, sweep_row, sweep_section
from _study_words import findings

from exactprune.training import load_data

PARTS = ("sweep", "networks", "compare", "equiv", "readme", "page")
EQUIV = ("A", "B", "eps", "upper", "lower", "ratio", "cpu seconds")
COMMAND = "exactprune compress models/fashion_2x100.pt -o small.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma separated")
    parts = [part.partition(":") for part in parser.parse_args().only.split(",")]
    wanted = {name: one for name, _, one in parts}
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    if "sweep" in wanted:
        sweep_cells(Cells(OUT / "sweep"), load_data("fashion-mnist"))
    if "compare" in wanted:
        for folder in experiments(wanted["compare"]):
            compare(folder)
    if "networks" in wanted:
        write_json(OUT / "networks.json", network_cells(Cells(OUT / "networks")))
    if "equiv" in wanted:
        write_csv(OUT / "equiv.csv", [{k: cell[k] for k in EQUIV} for cell in equiv_cells(Cells(OUT / "equiv"))])
    if "readme" in wanted:
        readme()
    if "page" in wanted:
        page()


def page() -> None:
    """index.md, index.html and the CSV files from what is there."""
    order = [s.name for s in SWEEPS]
    sweep = sorted((sweep_row(json.loads(file.read_text())) for file in (OUT / "sweep").glob("*.json")),
                   key=lambda row: (order.index(row["network"]), row["l1"], row["seed"]))
    file = OUT / "networks.json"
    networks = json.loads(file.read_text()) if file.exists() else []
    compared = results()
    write_page([sweep_section(sweep), networks_section(networks), *compare_sections(compared)],
               findings(sweep, networks, compared))


def readme() -> None:
    """What the README's command prints, word for word."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "models").symlink_to(ROOT / "models")
        program = Path(sys.executable).with_name("exactprune")
        done = subprocess.run([program, *COMMAND.split()[1:]], cwd=scratch, check=True, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
    write(ROOT / "reports" / "readme" / "compress.txt", done.stdout)


def write_json(file: Path, value: list[Facts]) -> None:
    write(file, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
