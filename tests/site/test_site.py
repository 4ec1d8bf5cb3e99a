"""The pages of `make docs` in a real browser, at two widths.

Screenshots are kept in build/screenshots. CHROMIUM names the browser; without
it chromium or google-chrome is looked for.
"""

from collections.abc import Iterator
import functools
from http import server
import os
import pathlib
import shutil
import threading
from urllib import parse

from playwright import sync_api
import pytest

_BUILD = pathlib.Path(__file__).parents[2] / "build"
_DOCS = _BUILD / "docs"
_SHOTS = _BUILD / "screenshots"
_PAGES = sorted(
  str(path.relative_to(_DOCS))
  for path in _DOCS.rglob("*.html")
  if not path.parts[len(_DOCS.parts)].startswith("_")
)
_WIDTHS = (1280, 390)
_BROWSERS = ("chromium", "google-chrome", "chrome")

# Of all that a reader sees, what sticks out of the window to the right, and is
# not in a part that scrolls.
_WIDE = """
() => [...document.querySelectorAll('article *')].filter(x => {
  const box = x.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1) return false;
  for (let y = x; y; y = y.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(y).overflowX))
      return false;
  return true;
}).map(x => x.outerHTML.slice(0, 200))
"""
_LINKS = "() => [...document.querySelectorAll('a[href]')].map(x => x.href)"
# TeX that is left in MathML.
_FORMULAS = r"""
() => [...document.querySelectorAll('math')].map(x => x.textContent)
  .filter(x => /[&\\]/.test(x))
"""
# Words in tables that stand on more lines than one.
_BROKEN = r"""
() => [...document.querySelectorAll('article table span.pre')]
  .filter(x => !/\s/.test(x.textContent) && x.getClientRects().length > 1)
  .map(x => x.textContent)
"""
_PICTURES = """
() => [...document.images].filter(x => x.complete && !x.naturalWidth)
  .map(x => x.src)
"""


class _Quiet(server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
  """The address of the pages."""
  assert (_DOCS / "index.html").exists(), "make docs builds the pages"
  handler = functools.partial(_Quiet, directory=str(_DOCS))
  with server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
  found = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, _BROWSERS)), None
  )
  assert found, "CHROMIUM names a browser, or one of " + ", ".join(_BROWSERS)
  with sync_api.sync_playwright() as playwright:
    running = playwright.chromium.launch(
      executable_path=found,
      args=["--no-sandbox", "--disable-background-networking"],
    )
    yield running
    running.close()


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("name", _PAGES)
def test_a_page_is_whole_and_no_wider_than_its_window(
  site, browser, name, width
):
  page = browser.new_page(viewport={"width": width, "height": 900})
  faults: list[str] = []
  asked: list[str] = []

  def hear(message):
    # What fails to load is a response too, with its address.
    if message.type == "error" and "Failed to load" not in message.text:
      faults.append(message.text)

  def see(response):
    # Browsers ask for an icon of every site.
    if response.status >= 400 and not response.url.endswith("favicon.ico"):
      faults.append(f"{response.status} {response.url}")

  page.on("console", hear)
  page.on("pageerror", lambda x: faults.append(str(x)))
  page.on("request", lambda x: asked.append(x.url))
  page.on("response", see)
  page.goto(site + name, wait_until="load")
  shot = _SHOTS / str(width) / name.replace("/", "_")
  page.screenshot(path=shot.with_suffix(".png"), full_page=True)
  assert not faults
  assert not [x for x in asked if not x.startswith((site, "data:"))]
  assert not page.evaluate(_WIDE)
  assert not page.evaluate(_BROKEN)
  assert not page.evaluate(_PICTURES)
  text = page.inner_text("article") if page.query_selector("article") else ""
  # Formulas that were not made into MathML.
  assert "\\frac" not in text and "$$" not in text
  assert not page.evaluate(_FORMULAS)
  for link in page.evaluate(_LINKS):
    address, _, anchor = link.partition("#")
    if address.startswith(site):
      path = parse.unquote(address.removeprefix(site)) or "index.html"
      assert (_DOCS / path).exists(), link
      if anchor and path == name:
        assert page.evaluate(
          "x => document.getElementById(x) !== null", parse.unquote(anchor)
        ), link
  page.close()


def test_the_search_finds_a_page(site, browser):
  page = browser.new_page()
  page.goto(f"{site}search.html?q=auxiliary")
  page.wait_for_selector("#search-results li a")
  page.close()
