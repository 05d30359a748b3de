"""`make docs` makes one page of the chapters that a browser shows whole: every picture is there, nothing sticks out."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make
from PIL import Image

sys.path.append(str(ROOT / "docs"))
from page import page

CHAPTERS = sorted((ROOT / "docs").glob("[1-8]-*.md"))
SHOTS = ROOT / "build" / "docs"  # to be looked at
WIDE, NARROW = 1300, 500
BROWSER = shutil.which("chromium") or shutil.which("chromium-headless-shell") or shutil.which("google-chrome")
# What the browser finds, as the page's title.
MEASURE = """<script>addEventListener("load", () => {
  const wide = box => box.scrollWidth > box.clientWidth;
  for (const details of document.querySelectorAll("details")) details.open = true;
  const seen = {};
  for (const section of document.querySelectorAll("section")) {
    const images = [...section.querySelectorAll("img")];
    seen[section.id] = {
      height: section.scrollHeight,
      pictures: images.length,
      missing: images.filter(i => !i.naturalWidth).map(i => i.alt),
      cut: [...section.querySelectorAll("pre, table")].filter(wide).map(e => e.innerText.slice(0, 200)),
    };
  }
  const here = [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute("href").slice(1));
  const nowhere = here.filter(id => !document.getElementById(id));
  document.title = JSON.stringify({sections: seen, wide: wide(document.documentElement), nowhere: nowhere});
});</script>"""


def browse(*flags):
    if not BROWSER:
        pytest.skip("no browser here: `apt-get install chromium` brings one")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(text, file, width=WIDE):
    """What MEASURE says of this page in a window so wide."""
    file.write_text(text + MEASURE)
    dom = browse(f"--window-size={width},800", "--dump-dom", file.as_uri())
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def article():
    return (ROOT / make("docs").strip()).read_text()


@pytest.fixture(scope="module")
def seen(article, tmp_path_factory):
    return look(article, tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_in_a_browser(chapter, seen, tmp_path):
    there = seen["sections"][chapter.name]
    assert there["pictures"] == chapter.read_text().count("![") > 0
    assert (there["missing"], there["cut"]) == ([], [])

    SHOTS.mkdir(parents=True, exist_ok=True)
    shot, height = SHOTS / f"{chapter.stem}.png", there["height"] + 200
    (tmp_path / "page.html").write_text(page([chapter]))
    browse(f"--window-size={WIDE},{height}", f"--screenshot={shot}", (tmp_path / "page.html").as_uri())
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert max(n for n, _ in colours) < 0.95 * WIDE * height  # a page is mostly white, but not all of it


def test_the_whole_page(article, seen, tmp_path):
    assert list(seen["sections"]) == [chapter.name for chapter in CHAPTERS]
    assert (seen["wide"], seen["nowhere"]) == (False, [])
    assert not look(article, tmp_path / "page.html", NARROW)["wide"]  # on a telephone, what is wide moves by itself
    for target in re.findall(r'(?:href|src)="([^"#:]+)["#]', article):
        assert (ROOT / "docs" / target).exists(), target


def test_the_browser_sees_faults(tmp_path):
    picture = base64.b64encode((ROOT / "docs" / "pictures" / "heads.png").read_bytes()).decode()
    faults = (
        f'<html><title></title><section id="x"><img alt="here" src="data:image/png;base64,{picture}">'
        f'<img alt="gone" src="data:image/png;base64,{picture[:40]}"><pre style="overflow: auto">{"m" * 999}</pre>'
        '</section><div style="width: 3000px">wide</div><a href="#nowhere">link</a></html>'
    )
    seen = look(faults, tmp_path / "page.html")
    assert (seen["sections"]["x"]["pictures"], seen["sections"]["x"]["missing"]) == (2, ["gone"])
    assert (len(seen["sections"]["x"]["cut"]), seen["wide"], seen["nowhere"]) == (1, True, ["nowhere"])
