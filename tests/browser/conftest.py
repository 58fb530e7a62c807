"""A real headless Chromium, driven by selenium; skipped with the reason where one of the three parts is missing."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from exactprune.claim import LayerVerdict, Status
from exactprune.domain import uniform
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, ReLU
from exactprune.options import VerifyOptions
from exactprune.report.html import write_report
from exactprune.report.record import write_run

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1100,900")


class Browser:
    """A Chromium with its console and network logs."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page):
        self.logs()
        self.driver.get(page.as_uri())

    def js(self, code, *arguments):
        return self.driver.execute_script(f"return {code}", *arguments)

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def logs(self):
        """(console messages, addresses asked for) since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return self.driver.get_log("browser"), asked

    def screen(self, width, height=900, media="", dark=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", media=media, features=[scheme])


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install 'exactprune[dev]')")
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome")
    browser, service = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not browser or not service:
        pytest.skip("no Chromium with chromedriver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(service))
    yield found
    found.quit()


@pytest.fixture
def browser(driver):
    found = Browser(driver)
    found.screen(1100)
    yield found
    found.screen(1100)


def layer_verdict(number, node, shape, seed=0):
    """Every status, bounds that fit it, and reasons where unknown."""
    rng, size = np.random.default_rng(seed + number), int(np.prod(shape))
    status = rng.choice([s.value for s in Status], size, p=[0.05, 0.35, 0.25, 0.35])
    low, high = -rng.exponential(2.0, size), rng.exponential(3.0, size)
    lower = np.where(status == Status.ACTIVE, high, low)
    upper = np.where(status == Status.INACTIVE, low / 2, 2 * high)
    method = np.select([status == Status.UNKNOWN, status == Status.UNSTABLE], [0, 5], rng.integers(1, 4, size))
    reasons = {int(i): "time limit" for i in np.flatnonzero(status == Status.UNKNOWN)}
    return LayerVerdict(number, node, shape, status, method, lower, upper, reasons)


def make_page(folder, layers):
    """A run folder with its report, of any layers; the network is a stand-in."""
    one = np.ones((1, 1), np.float32)
    network = build([Node("fc", Affine(one, one[0]), (INPUT,)), Node("relu", ReLU(), (0,))], (1,), np.float32,
                    name="<script>document.title='run'</script><img src=x onerror=document.title='run'>")
    totals = {"neurons": sum(la.status.size for la in layers), **{s.word: sum(la.count(s) for la in layers) for s in Status}}
    run = SimpleNamespace(
        network=network, domain=uniform(0, 1, (1,)), options=VerifyOptions(), layers=layers, records=({"record": "header"},),
        stages=tuple(SimpleNamespace(name=f"crown {la.node}", seconds=0.5, settled=1, detail="x") for la in layers),
        seconds=1.0, versions={"exactprune": "0.1.0"}, hardware={"cpus": 2}, totals=totals,
        check={"accepted": totals["neurons"] - totals["unknown"], "rejected": 0, "seconds": 0.1})
    write_run(run, folder)
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A page of a conv layer, a flat layer, and a layer that is named like an attack."""
    attack = "<script>alert(1)</script></script><!--"
    layers = (layer_verdict(0, "conv relu", (6, 4, 4)), layer_verdict(1, attack, (40,)), layer_verdict(2, "last", (1500,)))
    return make_page(tmp_path_factory.mktemp("small"), layers)


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """100,000 neurons: convolutions and flat layers."""
    shapes = [(64, 24, 24), (64, 24, 24), (128, 12, 12), (4096,), (3744,)]
    layers = tuple(layer_verdict(k, f"relu_{k}", shape) for k, shape in enumerate(shapes))
    assert sum(layer.status.size for layer in layers) == 100_000
    return make_page(tmp_path_factory.mktemp("large"), layers)
