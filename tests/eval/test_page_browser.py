"""The pages of reports in a real browser: it opens from disk, says nothing on the console, asks nothing of the network, and can be used.

Needs Debian's chromium and chromium-driver, or any other Chromium and chromedriver on PATH.
"""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_inspect import compressed_report, smollm2_report
from helpers_reports import comparison_report, compress_report, evaluation

from planish.common.schemas import to_json
from planish.eval.pages.outlier_page import outlier_page
from planish.report_command import write_pages

pytestmark = pytest.mark.slow

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync", "--hide-scrollbars")
VIEWS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 375)}
PLOTS = {"one": 7, "two": 13, "compress": 0, "compare": 0, "eval": 0, "index": 0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in QUIET:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "one.html").write_text(outlier_page(smollm2_report()), encoding="utf-8")
    (folder / "two.html").write_text(outlier_page(compressed_report(), smollm2_report()), encoding="utf-8")
    for name, report in (("compress", compress_report()), ("compare", comparison_report()), ("eval", evaluation())):
        (folder / f"{name}.json").write_text(to_json(report), encoding="utf-8")
    for page in write_pages([folder], folder / "pages"):
        page.rename(folder / page.name)
    return folder


def show(browser: Any, path: Path, scheme: str = "light", width: int = 1280) -> None:
    """Open the page, and wait until its script is done."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    browser.execute_async_script(
        "const done = arguments[0]; const poll = () => 'ready' in document.documentElement.dataset ? done() : setTimeout(poll, 20); poll();"
    )


def requests(browser: Any) -> list[str]:
    """What the page asked for since the last look."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]


def column(browser: Any, table: str, index: int) -> list[str]:
    """The texts of a table's column, from top to bottom."""
    script = "return [...document.querySelectorAll(`${arguments[0]} tbody tr`)].map((row) => row.cells[arguments[1]].textContent)"
    found: list[str] = browser.execute_script(script, table, index)
    return found


def click_heading(browser: Any, table: str, index: int, key: str | None = None) -> str:
    """Sort by a column, by mouse or with a key, and say how it is sorted now."""
    from selenium.webdriver.common.by import By

    button = browser.find_elements(By.CSS_SELECTOR, f"{table} th button")[index]
    if key is None:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
        button.click()
    else:
        button.send_keys(key)
    order: str = browser.execute_script("return arguments[0].parentElement.getAttribute('aria-sort')", button)
    return order


def shown(browser: Any, figure: str, expression: str) -> Any:
    """Something of what plotly.js shows in a figure's first plot."""
    return browser.execute_script(f"const plot = document.querySelector('#{figure} .plot'); return {expression}")


def luminance(colour: str) -> float:
    """Of rgb(r, g, b), by WCAG 2.2."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page", PLOTS)
def test_it_opens_quietly(browser: Any, folder: Path, page: str, view: str) -> None:
    path = folder / f"{page}.html"
    show(browser, path, *VIEWS[view])
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert {url for url in requests(browser) if not url.startswith(("data:", "blob:"))} == {path.as_uri()}
    plots = browser.execute_script("return [...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.main-svg').length)")
    assert len(plots) == PLOTS[page]
    assert all(plots)
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, "the page as a whole must not scroll sideways"
    picture = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])
    (folder / f"{page}-{view}.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > (5_000 if page == "index" else 20_000)


@pytest.mark.parametrize("page", ["one", "compress", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, folder: Path, scheme: str, page: str) -> None:
    show(browser, folder / f"{page}.html", scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    colours = {
        name: browser.execute_script(f"return getComputedStyle(document.querySelector('{name}')).color") for name in ("p", ".subtitle", "td", "nav a")
    }
    picture = ".plot .xtick text" if page == "one" else ".drawings text.tick"
    colours["picture"] = browser.execute_script(f"return getComputedStyle(document.querySelector('{picture}')).fill")
    for name, colour in colours.items():
        light, dark = sorted((luminance(ground), luminance(colour)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_wide_tables_scroll_in_their_own_box(browser: Any, folder: Path) -> None:
    show(browser, folder / "compare.html", width=375)
    boxes = browser.execute_script("return [...document.querySelectorAll('.scroll')].map((box) => [box.scrollWidth, box.clientWidth])")
    assert any(inner > outer for inner, outer in boxes)
    assert all(outer <= 375 for _, outer in boxes)


def test_reports_lead_to_each_other(browser: Any, folder: Path) -> None:
    from selenium.webdriver.common.by import By

    show(browser, folder / "compress.html")
    browser.find_element(By.LINK_TEXT, "eval: out against demo:smollm2").click()
    assert browser.title == "Evaluation of out"


@pytest.mark.parametrize("page", ["compress", "compare", "eval"])
def test_pages_without_plots_print_on_few_sheets(browser: Any, folder: Path, page: str) -> None:
    show(browser, folder / f"{page}.html", "dark")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"])
    assert 1 <= pdf.count(b"/Type /Page\n") <= 8


def test_lines_change_with_the_scheme(browser: Any, folder: Path) -> None:
    show(browser, folder / "one.html", "light")
    before = shown(browser, "depth", "plot._fullLayout.font.color + plot._fullData[0].line.color")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    after = shown(browser, "depth", "plot._fullLayout.font.color + plot._fullData[0].line.color")
    assert (before, after) == ("#1b1f24#0072B2", "#e8eaed#56B4E9")


def test_tables_sort(browser: Any, folder: Path) -> None:
    show(browser, folder / "one.html")
    sites = sorted(smollm2_report().sites, key=lambda site: -site.ordinary.kurtosis)
    assert click_heading(browser, "#sites", 3) == "descending"
    assert column(browser, "#sites", 0) == [site.name for site in sites]
    assert click_heading(browser, "#sites", 3) == "ascending"
    assert column(browser, "#sites", 0) == [site.name for site in reversed(sites)]
    assert click_heading(browser, "#sites", 0, key="\n") == "ascending"
    assert column(browser, "#sites", 0)[:5] == ["0.down", "0.gate_up", "0.o", "0.qkv", "1.down"]  # 10 after 9, as numbers go
    assert column(browser, "#sites", 0)[-1] == "29.qkv"
    headings = browser.execute_script("return [...document.querySelectorAll('#sites th')].filter((th) => th.hasAttribute('aria-sort')).length")
    assert headings == 1


def test_what_is_missing_is_sorted_last(browser: Any, folder: Path) -> None:
    show(browser, folder / "one.html")
    assert click_heading(browser, "#interventions", 1) == "descending"
    assert column(browser, "#interventions", 1) == ["11", "11", "–"]
    click_heading(browser, "#interventions", 1)
    assert column(browser, "#interventions", 1) == ["11", "11", "–"]


def test_menus_and_sliders_choose_what_is_shown(browser: Any, folder: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    show(browser, folder / "one.html")
    measure, tokens = (Select(each) for each in browser.find_elements(By.CSS_SELECTOR, "#difficulty select"))
    measure.select_by_visible_text("kurtosis")
    tokens.select_by_visible_text("all tokens")
    site = next(site for site in smollm2_report().sites if site.name == "11.down")
    assert shown(browser, "difficulty", "plot._fullData[0].customdata[3][11]") == site.every.kurtosis
    assert shown(browser, "difficulty", "plot._fullLayout.coloraxis.colorbar.title.text") == "kurtosis (log)"
    hardest = max(smollm2_report().sites, key=lambda site: site.errors["w4a4"]["plain"])
    assert shown(browser, "channels", "plot._fullData[0].y") == pytest.approx(hardest.channel_absmax, rel=2e-3)
    slider = browser.find_element(By.CSS_SELECTOR, "#landscape input")
    assert shown(browser, "landscape", "plot._fullData[0].customdata[0][101]") == [pytest.approx(25_660, rel=2e-3), "505–509"]
    slider.send_keys(Keys.HOME)
    assert slider.get_attribute("aria-valuetext") == "embeddings"
    assert shown(browser, "landscape", "plot._fullData[0].customdata[0][101][0]") < 10
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_the_recipe_is_copied(browser: Any, folder: Path) -> None:
    from selenium.webdriver.common.by import By

    show(browser, folder / "one.html")
    button = browser.find_element(By.CSS_SELECTOR, ".copy")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    script = "const done = arguments[0]; setTimeout(() => done(document.querySelector('figcaption [role=status]').textContent), 200)"
    assert browser.execute_async_script(script) in ("Copied.", "Selected: press Ctrl+C or ⌘C.")


def test_it_prints_in_light_on_paper_width(browser: Any, folder: Path) -> None:
    show(browser, folder / "one.html", "dark")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert shown(browser, "depth", "plot._fullData[0].line.color") == "#0072B2"
    assert shown(browser, "depth", "plot._fullLayout.width") <= 700
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert shown(browser, "depth", "plot._fullData[0].line.color") == "#56B4E9"
    assert shown(browser, "depth", "plot._fullLayout.width") > 1000
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"])
    assert pdf.startswith(b"%PDF")


@pytest.mark.parametrize("page", ["one", "two"])
def test_it_is_a_file_to_send_by_mail(folder: Path, page: str) -> None:
    assert (folder / f"{page}.html").stat().st_size < 8_000_000
