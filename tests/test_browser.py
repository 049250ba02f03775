"""Reports in headless Chromium: no console error, no request, the marked cell, the keyboard, accessibility, size."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import diverging, hostile, huge, passing, recorded_otherwise

from checkpoints.answers.drift import Entry
from reports.history_html import history_html
from reports.html import html
from reports.report import Report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install parity[test]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt-get install chromium chromium-driver"
    ),
]
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
)
REPORTS: dict[str, Callable[[], Report]] = {
    **{"passing": passing, "diverging": diverging, "hostile": hostile, "huge": huge},
    "otherwise": recorded_otherwise,
}
MOST_NODES = 20_000  # what a browser still scrolls smoothly; the ticket's own number


class Page:
    """A browser window; `open` shows a report."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._folder = folder
        self._files: dict[str, Path] = {}

    def open(self, name: str, *, scheme: str = "light", width: int = 1100) -> None:
        """Show a report, fresh, and forget what was logged before."""
        if name not in self._files:
            self._files[name] = self._folder / f"{name}.html"
            self._files[name].write_text(history() if name == "history" else html(REPORTS[name]()), encoding="utf-8")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(self._files[name].as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))


def history() -> str:
    """Margins of 40 checks, one point growing."""
    entries = [
        Entry(f"2026-01-{1 + n % 28:02}T00:00:00+00:00", f"{n:040x}", "parity", "ours", "f00d", {},
              {"embd": (0.0, 1e-10, 0.0), "logits": (1e-12 * 1.1**n, 1e-9, 1e-3 * 1.1**n)})
        for n in range(40)
    ]  # fmt: skip
    return history_html(entries, ["logits: the error is 0.041 of its limit, 0.001 at its best"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests."""
    options = webdriver.ChromeOptions()
    for option in OPTIONS.split():
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(
        1200
    )  # axe takes seconds of processor time, which a busy machine hands out slowly: 30 s are the default
    driver.set_page_load_timeout(1200)
    try:
        yield Page(driver, tmp_path_factory.mktemp("reports"))
    finally:
        driver.quit()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("passing", "light"),
        ("diverging", "dark"),
        *((name, "light") for name in ("diverging", "hostile", "huge", "history")),
        ("passing", "dark"),
    ],
)
def test_it_opens_quietly(name: str, scheme: str, page: Page) -> None:
    """Nothing in the console, no request but for the file itself, few enough nodes to scroll, no serious fault for axe."""
    page.open(name, scheme=scheme)
    assert page.driver.get_log("browser") == []
    asked = [entry["message"] for entry in page.driver.get_log("performance") if "requestWillBeSent" in entry["message"]]
    addresses = [message.split('"url":"', 1)[1].split('"', 1)[0] for message in asked if '"url":"' in message]
    assert addresses, "the file itself is seen, or nothing would be"
    assert {address.split(":", 1)[0] for address in addresses} <= {"file", "data"}
    assert page.js("return document.querySelectorAll('svg').length") >= 1
    assert page.js("return [...document.querySelectorAll('*')].reduce((n, e) => n + 1 + e.childNodes.length, 0)") < MOST_NODES
    assert serious(page) == []


def serious(page: Page) -> list[str]:
    """The serious and critical findings of axe-core, with their elements."""
    package = pytest.importorskip("axe_core_python", reason="axe-core is not installed: pip install parity[test]")
    page.js(Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    alike = ".tall tbody tr:nth-child(n + 40)"  # of some hundred rows that are alike the first ones: axe is slow
    violations = page.driver.execute_async_script(
        """const [alike, done] = arguments; const what = document.querySelector(alike) ? {exclude: [[alike]]} : document;
        axe.run(what, {resultTypes: ['violations']}).then((r) => done(r.violations), (e) => done([{id: String(e)}]))""",
        alike,
    )
    assert all("impact" in item for item in violations), violations
    return [f"{item['id']}: {item['nodes'][0]['html']}" for item in violations if item["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("name", ["diverging", "hostile", "huge"])
def test_the_first_divergence_is_marked(name: str, page: Page) -> None:
    """The mark stands on the first divergence's cell: its place says so, and pointing at its middle tells of that record."""
    page.open(name)
    first = REPORTS[name]().verdict.first_divergence
    assert first is not None
    assert page.js("return document.querySelector('#first-divergence').dataset.place").endswith(f"@{first.token_idx}")
    page.js(
        """const mark = document.querySelector('#first-divergence'); mark.scrollIntoView({block: 'center'});
        const box = mark.getBoundingClientRect();
        document.querySelector('#map').dispatchEvent(new PointerEvent('pointermove', {bubbles: true,
            clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}));"""
    )
    readout = page.text("#readout")
    assert readout.endswith("first divergence")
    assert f"position {first.token_idx}" in readout
    assert "NMSE" in readout


def test_colours_tell_right_from_wrong(page: Page) -> None:
    """The picture itself: above the first diverging point the cells are blue, from it on red."""
    page.open("diverging")
    colours = page.js(
        """const image = document.querySelector('#map image'); const picture = new Image(); picture.src = image.getAttribute('href');
        const canvas = document.createElement('canvas'); canvas.width = picture.width; canvas.height = picture.height;
        const brush = canvas.getContext('2d'); brush.drawImage(picture, 0, 0);
        return [1, 2].map((row) => [...brush.getImageData(5, row, 1, 1).data]);"""
    )
    (red, _, blue, _), (red_below, _, blue_below, _) = colours
    assert blue > red
    assert red_below > blue_below


def test_what_is_not_judged_is_grey(page: Page) -> None:
    """A point that was recorded otherwise is covered in grey, not in the blue of the smallest errors, and its cell says so."""
    page.open("otherwise")
    covers = page.js("return [...document.querySelectorAll('#map .otherwise rect')].map((r) => getComputedStyle(r).fill)")
    assert covers == ["rgb(122, 122, 122)"]
    page.js("document.querySelector('#map').focus()")
    page.driver.switch_to.active_element.send_keys("\ue015")  # arrow down: from the embedding to blk.0.l_out
    assert page.text("#readout").endswith("recorded otherwise")


def test_the_keyboard_reaches_every_record(page: Page) -> None:
    """Tab order reaches the map; arrows, Home, End and Page keys move; the button leads to the first divergence."""
    page.open("diverging")
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    the_map = page.driver.find_element("id", "map")
    page.driver.find_element("id", "to-mark").send_keys(keys.ENTER)
    assert page.js("return document.activeElement.id") == "map"
    assert page.text("#readout").startswith("blk.5.l_out, position 3")
    for key, place in (
        (keys.ARROW_RIGHT, "blk.5.l_out, position 4"),
        (keys.ARROW_UP, "blk.0.l_out, position 4"),
        (keys.ARROW_LEFT, "blk.0.l_out, position 3"),
        (keys.ARROW_DOWN, "blk.5.l_out, position 3"),
        (keys.END, "blk.5.l_out, position 11"),
        (keys.HOME, "blk.5.l_out, position 0"),
        (keys.PAGE_DOWN, "blk.10.l_out, position 0"),
        (keys.PAGE_UP, "blk.5.l_out, position 0"),
    ):
        the_map.send_keys(key)
        assert page.text("#readout").startswith(place)


def test_scripts_are_shown_as_text(page: Page) -> None:
    """A script in every string of a dump is read, not run."""
    page.open("hostile")
    assert page.js("return window.stolen") is None
    assert "<script>window.stolen" in page.text("body")


@pytest.mark.parametrize("name", ["diverging", "huge"])
def test_a_phone_shows_it(name: str, page: Page) -> None:
    """At 390 pixels nothing is wider than the screen: wide tables scroll in themselves."""
    page.open(name, width=390)
    assert page.js("return document.documentElement.scrollWidth") <= 390
    assert page.driver.get_log("browser") == []


def test_it_prints(page: Page) -> None:
    """Printed, every row of the points is on paper: nothing scrolls there."""
    page.open("diverging")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.js("const t = document.querySelector('.tall'); return [t.scrollHeight, t.clientHeight]")[0] <= page.js(
            "return document.querySelector('.tall').clientHeight"
        )
        assert page.driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_dataflow_is_coloured_and_leads_to_figures(page: Page) -> None:
    """The layer of the first divergence is drawn, its point in red; a click leads to its figures; another can be chosen."""
    page.open("diverging")
    first = REPORTS["diverging"]().verdict.first_divergence
    assert first is not None
    strokes = page.js(
        "return Object.fromEntries([...document.querySelectorAll('#flow .known')].map("
        "(g) => [g.dataset.point, g.querySelector('rect').getAttribute('stroke')]))"
    )
    assert strokes[first.checkpoint] == "#d62718"
    page.js(
        "document.querySelector(`#flow [data-point='${arguments[0]}']`).dispatchEvent(new MouseEvent('click'))",
        first.checkpoint,
    )
    assert page.text("#readout").startswith(f"{first.checkpoint}, position ")
    assert page.text(".chosen th") == first.checkpoint
    layers = page.js("return [...document.querySelectorAll('#flow-layer option')].map((o) => o.label)")
    assert len(layers) > 1
    page.js("const s = document.querySelector('#flow-layer'); s.value = 0; s.dispatchEvent(new Event('change'))")
    assert page.js("return document.querySelector('#flow svg').getAttribute('aria-label')") == f"Dataflow of {layers[0]}"
    assert "#3a78b5" in page.js(
        "return [...document.querySelectorAll('#flow .known rect')].map((r) => r.getAttribute('stroke'))"
    )
    assert page.driver.get_log("browser") == []
