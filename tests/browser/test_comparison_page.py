"""comparison.html in a real browser: names like an attack do nothing, wherever they come from; tables sort and filter."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from exactprune.domain import uniform
from exactprune.io import save
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, ReLU
from exactprune.report.comparison import Study, run_study, write_comparison
from exactprune.report.comparison_page import render_comparison

ATTACK = "<script>alert(1)</script>"
ROWS = "[...document.querySelectorAll('#table-changes tbody tr:not(.control)')].filter(r => !r.hidden)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A study of a small random network on pictures of 4 x 4, with names like an attack put in everywhere."""
    folder, rng = tmp_path_factory.mktemp("comparison"), np.random.default_rng(0)
    sizes = (16, 12, 8, 3)
    nodes = []
    for k in range(3):
        weight = rng.normal(size=(sizes[k + 1], sizes[k])).astype(np.float32)
        bias = np.where(np.arange(sizes[k + 1]) % 3 == 0, -30.0, 0.1).astype(np.float32) * (k < 2)
        nodes.append(Node(f"fc{k}", Affine(weight, bias.astype(np.float32)), (len(nodes) - 1,)))
        if k < 2:
            nodes.append(Node(f"relu{k}", ReLU(), (len(nodes) - 1,)))
    nodes[0] = Node("fc0", nodes[0].op, (INPUT,))
    network = build(nodes, (16,), np.float32)
    save(network, folder / "m.onnx")
    x = uniform(0, 1, (16,)).sample(300, rng).astype(np.float32)
    np.savez(folder / "d.npz", x=x[:200], y=np.arange(200) % 3, x_test=x[200:], y_test=network.evaluate(x[200:]).argmax(1))
    study = Study(str(folder / "m.onnx"), str(folder / "d.npz"), ("wanda",), (2, 8, 512), (0,), finetune=1, certify=20,
                  image=(4, 4), classes=tuple(f"{c}{ATTACK}" for c in "a&c"), title=ATTACK, time_limit=5.0,
                  timing=0.0)
    write_comparison(study, folder / "out")
    facts = json.loads((folder / "out" / "comparison.json").read_text())
    text = json.dumps(facts).replace('"wanda', json.dumps(f"{ATTACK} wanda")[:-1]).replace('"fc1"', json.dumps(f"{ATTACK} fc1"))
    (folder / "out" / "comparison.html").write_text(render_comparison(json.loads(text)))
    return folder / "out" / "comparison.html"


def test_opens_without_a_console_message_and_asks_for_nothing_else(browser, page):
    browser.open(page)
    console, asked = browser.logs()
    assert console == [] and browser.js("document.documentElement.dataset.ready") == "yes"
    assert asked[0] == page.as_uri() and all(url == page.as_uri() or url.startswith("data:") for url in asked)


def test_names_do_nothing_and_are_shown_as_they_are(browser, page):
    browser.open(page)
    assert browser.js("document.scripts.length") == 1
    assert browser.js("document.querySelector('h1').textContent") == ATTACK
    for where in ("#accuracy figcaption", "#table-densities th button", "#table-changes tbody th", "#method option", ".is-first"):
        shown = browser.js(f"[...document.querySelectorAll('{where}')].map(e => e.textContent)")
        assert any(ATTACK in text for text in shown), where
    assert browser.logs()[0] == []


def test_the_policy_stops_a_script_and_a_picture_from_elsewhere(browser, page):
    browser.open(page)
    browser.js("(() => { const s = document.createElement('script'); s.textContent = 'window.inside = 1';"
               "document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i) })()")
    assert browser.js("window.inside") is None
    assert sum("Content Security Policy" in entry["message"] for entry in browser.logs()[0]) == 2


def test_every_picture_is_shown_with_a_description(browser, page):
    browser.open(page)
    images = browser.js("[...document.images].map(i => [i.src.slice(0, 22), i.naturalWidth, i.naturalHeight, i.alt])")
    assert images and all(i[:3] == ["data:image/png;base64,", 4, 4] and i[3] for i in images)


def test_tables_sort_both_ways_and_keep_the_controls_on_top(browser, page):
    browser.open(page)
    whole = "[...document.querySelectorAll('#table-changes tbody tr')].slice(0, 2).map(r => r.cells[0].textContent)"
    for column, direction, reverse in [(c, *d) for c in range(10) for d in (("ascending", False), ("descending", True))]:
        head = f"document.querySelectorAll('#table-changes thead th')[{column}]"
        browser.js(f"{head}.firstChild.click()")
        assert browser.js(f"{head}.getAttribute('aria-sort')") == direction
        shown = browser.js(f"{ROWS}.map(r => r.cells[{column}].dataset.v)")
        keys = shown if column == 0 else [float(v) for v in shown]
        assert keys == sorted(keys, reverse=reverse) and len(keys) == 12
        assert browser.js(whole) == ["dense", "lossless"]


def test_one_method_and_one_ratio_can_be_chosen(browser, page):
    browser.open(page)
    for name, value, count in (("method", "magnitude", 3), ("ratio", "8x", 1), ("method", "", 4)):
        browser.js(f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}'; "
                   "s.dispatchEvent(new Event('change')) })()")
        assert browser.js(f"{ROWS}.length") == count


def test_a_collapsed_layer_is_flagged(browser, page):
    browser.open(page)
    flags = browser.js("[...document.querySelectorAll('#table-densities .flag')].map(e => e.textContent)")
    assert any("fc" in text or "one class" in text for text in flags)


@pytest.mark.parametrize(("width", "dark"), [(320, False), (375, False), (375, True), (800, True)])
def test_no_width_scrolls_sideways(browser, page, width, dark):
    browser.screen(width, dark=dark)
    browser.open(page)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.js("document.documentElement.scrollWidth") <= width
    inner = ("[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg') && "
             "e.getBoundingClientRect().right > innerWidth + 1).length")
    assert browser.js(inner) == 0


def test_on_paper_it_is_a_document(browser, page):
    browser.open(page)
    browser.screen(800, media="print", dark=True)
    assert browser.js("getComputedStyle(document.getElementById('controls')).display") == "none"
    assert browser.js("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.js("[...document.querySelectorAll('table')].every(t => t.getBoundingClientRect().right <= innerWidth)")
    pdf = base64.b64decode(browser.cdp("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_every_control_and_picture_has_a_name(browser, page):
    browser.open(page)
    tree = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n.get("ignored")]
    wanted = {"button", "combobox", "link", "image", "heading", "region", "navigation", "img"}
    assert {"button", "combobox", "link", "heading", "region"} <= {role for role, _ in named}
    assert [role for role, name in named if role in wanted and not name.strip()] == []


def test_the_same_facts_give_the_same_bytes(page):
    facts = json.loads((page.parent / "comparison.json").read_text())
    assert render_comparison(facts) == render_comparison(json.loads(json.dumps(facts)))


def test_names_with_control_characters_are_stripped(tmp_path, page):
    folder = page.parent.parent
    study = Study(str(folder / "m.onnx"), str(folder / "d.npz"), (), (2,), (0,), certify=0, title="a\x1b[31m\u202eb", combine=(),
                  time_limit=5.0, timing=0.0)
    assert run_study(study)["title"] == "a[31mb"
