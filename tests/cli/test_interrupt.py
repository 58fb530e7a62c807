"""Ctrl-C: exit code 3, one line, and what was finished stays for --resume."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

SLOW = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
pipeline = types.ModuleType("exactprune.pipeline")
def verify(network, domain, options, *, data, progress, checkpoint):
    progress.stage("slow", 10)
    if {keep}:
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text("half")
    print("started", file=sys.stderr, flush=True)
    time.sleep(60)
pipeline.verify = verify
sys.modules["exactprune.pipeline"] = pipeline
from exactprune.cli import main
main(["verify", "m.pt"])
"""


@pytest.mark.parametrize(("number", "keep"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted_runs_end_with_code_3(here, number, keep):
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), here / "m.pt")
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(keep=keep)], cwd=here, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None and process.stderr.readline() == "started\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert err.startswith("exactprune: error: interrupted; ") and err.count("\n") == 1
    assert ("--resume" in err) == keep
    assert (here / "m.exactprune" / "checkpoint").exists() == keep
    assert not (here / "m.exactprune" / "run.json").exists()
