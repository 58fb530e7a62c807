"""report.html in a real browser: nothing runs that should not, nothing is fetched, and the table does what it says."""

from __future__ import annotations

import base64
import csv
import time

import pytest

ROWS = "[...document.querySelectorAll('#rows tr:not([aria-hidden])')].map(tr => [...tr.cells].map(td => td.textContent))"


def wait_for(browser, code, value, seconds=10.0):
    end = time.monotonic() + seconds
    while (found := browser.js(code)) != value:
        assert time.monotonic() < end, f"{code} is {found!r}, not {value!r}"
        time.sleep(0.02)


def search(browser, text):
    browser.js("(() => { const s = document.getElementById('search'); s.value = arguments[0]; "
               "s.dispatchEvent(new Event('input')) })()".replace("arguments[0]", repr(text)))


def choose(browser, name, value):
    browser.js(f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}'; "
               "s.dispatchEvent(new Event('change')) })()")


def found(browser):
    return browser.js("document.getElementById('found').textContent")


def neurons(page):
    return list(csv.DictReader((page.parent / "neurons.csv").read_text().splitlines()))


def test_opens_without_a_console_message_and_asks_for_nothing_else(browser, small):
    browser.open(small)
    wait_for(browser, "document.documentElement.dataset.ready", "yes")
    console, asked = browser.logs()
    assert console == []
    assert asked[0] == small.as_uri() and all(url == small.as_uri() or url.startswith("data:") for url in asked)


def test_names_from_a_model_do_nothing_and_are_shown_as_they_are(browser, small):
    browser.open(small)
    assert browser.js("document.title") != "run"
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.images.length") == 0
    assert "<script>alert(1)</script></script><!--" in browser.js("document.querySelector('#layer-1 h3').textContent")
    choose(browser, "layer", "1")
    assert browser.js(ROWS)[0][1] == "1 (node <script>alert(1)</script></script><!--)"
    assert browser.logs()[0] == []  # an alert would also make the commands above fail


def test_the_policy_stops_a_script_that_gets_in_all_the_same(browser, small):
    browser.open(small)
    browser.js("(() => { const s = document.createElement('script'); s.textContent = 'window.inside = 1'; "
               "document.body.append(s) })()")
    assert browser.js("window.inside") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.logs()[0])


def test_the_table_holds_every_neuron_in_order(browser, small):
    browser.open(small)
    expected = neurons(small)
    assert found(browser) == f"{len(expected):,} of {len(expected):,} neurons"
    assert browser.js("document.getElementById('table').getAttribute('aria-rowcount')") == str(len(expected) + 1)
    browser.js("document.getElementById('scroll').scrollTo(0, 1e9)")
    last = expected[-1]
    wait_for(browser, f"{ROWS}.at(-1)[0]", last["index"])
    assert browser.js(f"{ROWS}.at(-1)")[2:4] == [last["status"], last["method"] or "—"]
    assert browser.js("document.querySelectorAll('#rows tr').length") < 60


@pytest.mark.parametrize(("column", "field"), [(4, "lower"), (5, "upper")])
def test_sorting_by_a_bound(browser, small, column, field):
    browser.open(small)
    values = sorted(float(row[field]) for row in neurons(small))
    button = f"document.querySelector('#table thead button[data-key={field}]')"
    for sort, first in (("ascending", values[0]), ("descending", values[-1])):
        browser.js(f"{button}.click()")
        assert browser.js(f"{button}.parentElement.getAttribute('aria-sort')") == sort
        shown = [float(row[column]) for row in browser.js(ROWS)]
        assert shown == sorted(shown, reverse=sort == "descending")
        assert shown[0] == pytest.approx(first, rel=1e-5)


def test_sorting_by_a_word(browser, small):
    browser.open(small)
    browser.js("document.querySelector('#table thead button[data-key=status]').click()")
    assert {row[2] for row in browser.js(ROWS)} == {"active"}


def test_search_and_filters_find_what_neurons_csv_holds(browser, small):
    browser.open(small)
    rows = neurons(small)
    cases = {"crown last": lambda r: r["method"] in ("crown", "alpha-crown") and r["node"] == "last",
             "time limit": lambda r: r["reason"] == "time limit",
             "17": lambda r: r["index"] == "17",
             "ch3 conv": lambda r: r["node"] == "conv relu" and r["channel"] == "3",
             "no such thing": lambda r: False}
    for text, holds in cases.items():
        search(browser, text)
        wait_for(browser, "document.getElementById('found').textContent", f"{sum(map(holds, rows)):,} of {len(rows):,} neurons")
    search(browser, "")
    choose(browser, "status", "unknown")
    choose(browser, "layer", "2")
    wanted = sum(r["status"] == "unknown" and r["layer"] == "2" for r in rows)
    wait_for(browser, "document.getElementById('found').textContent", f"{wanted:,} of {len(rows):,} neurons")


def test_a_neuron_says_why_from_the_keyboard(browser, small):
    from selenium.webdriver.common.keys import Keys

    browser.open(small)
    choose(browser, "status", "unknown")
    button = browser.driver.find_element("css selector", "#rows button")
    button.send_keys(Keys.ENTER)
    words = browser.js("document.getElementById('why').textContent")
    assert "Why it is unknown: time limit." in words and "nothing is ever removed on unknown" in words


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 375, 800])
def test_no_width_scrolls_sideways(browser, small, width, dark):
    browser.screen(width, dark=dark)
    browser.open(small)
    assert browser.js("document.documentElement.scrollWidth") <= width
    inner = ("[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg') && "
             "e.getBoundingClientRect().right > innerWidth + 1).length")
    assert browser.js(inner) == 0


def test_dark_is_dark_and_light_is_light(browser, small):
    colours = []
    for dark in (False, True):
        browser.screen(800, dark=dark)
        browser.open(small)
        colours.append(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_on_paper_it_is_a_document(browser, small):
    browser.open(small)
    browser.screen(800, media="print", dark=True)
    shown = "getComputedStyle(document.querySelector('{}')).display"
    assert browser.js(shown.format("#explorer")) == browser.js(shown.format("nav")) == "none"
    assert browser.js(shown.format(".print-only")) == "block"
    assert browser.js("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    pdf = base64.b64decode(browser.cdp("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_every_control_and_picture_has_a_name(browser, small):
    browser.open(small)
    tree = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n.get("ignored")]
    wanted = {"button", "combobox", "searchbox", "link", "image", "heading", "region", "table", "navigation", "img"}
    assert {role for role, _ in named} >= {"button", "combobox", "searchbox", "link", "heading", "region"}
    assert [role for role, name in named if role in wanted - {"table"} and not name.strip()] == []


def test_100_000_neurons_are_usable_in_under_3_seconds(browser, large):
    """From navigation to a page that answers, by the page's own clock; the best of 3, as other work shares the machine."""
    times = []
    for _ in range(3):
        browser.open(large)
        wait_for(browser, "document.documentElement.dataset.ready", "yes")
        times.append(browser.js("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1000)
    assert found(browser) == "100,000 of 100,000 neurons"
    began = browser.js("performance.now()")
    browser.js("document.querySelector('#table thead button[data-key=upper]').click()")
    sort = (browser.js("performance.now()") - began) / 1000
    search(browser, "unknown relu_3")
    wanted = sum(r["status"] == "unknown" and r["node"] == "relu_3" for r in neurons(large))
    wait_for(browser, "document.getElementById('found').textContent", f"{wanted:,} of 100,000 neurons")
    print(f"100,000 neurons: page {large.stat().st_size / 1e6:.1f} MB, usable in {min(times):.2f} s, sorted in {sort:.2f} s")
    assert min(times) < 3 and sort < 3
