"""What the chapters and the README say holds: links lead somewhere, commands print what stands below them, a picture
that a command or docs/pictures.py draws is the one that is shown.

In the lines below a command `~12.3` is a number that varies, and `...` alone stands for lines that were left out.
"""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, SANITIZE
from PIL import Image, ImageChops, ImageStat

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name[0].isdigit()], ids=lambda page: page.name)
def test_functions(page):
    """What the section on the function names is in one of the files that it links to."""
    section = re.search(r"^## The (?:exact )?function\n(.*?)^## ", page.read_text(), re.MULTILINE | re.DOTALL)[1]
    sources = "".join(
        (page.parent / link).read_text() for link in re.findall(r"\]\((\.\./[^)#]+\.(?:h|cpp|cu))\)", section)
    )
    names = re.findall(r"`(?:\w+::)?(\w+)`", section)
    assert names and [name for name in names if not re.search(rf"\b{name}\b", sources)] == []


def commands(page):
    """[(command, the lines below it)]: `    $ command`, and the indented lines that follow, empty ones between them."""
    found = re.findall(r"^ {4}\$ (.*)\n((?:(?:\n)* {4}(?!\$ ).*\n)*)", page.read_text(), re.MULTILINE)
    return [(command, [line[4:].rstrip() for line in lines.splitlines()]) for command, lines in found]


def pattern(lines):
    """A regular expression for what may be printed."""
    each = [r"\s*[\d.,]+".join(re.escape(part) for part in re.split(r"\s*~[\d.,]+", line)) + r"\s*\n" for line in lines]
    return "".join(r"(?:.*\n)*" if line == "..." else one for line, one in zip(lines, each, strict=True))


def test_marks_of_what_varies():
    lines = ["decode  ~12.5 tokens/s of 7", "...", "end"]
    assert re.fullmatch(pattern(lines), "decode 3,400.1 tokens/s of 7\nmore\n\nend\n")
    assert re.fullmatch(pattern(lines), "decode 1 tokens/s of 7  \nend\n")
    assert not re.fullmatch(pattern(lines), "decode 12.5 tokens/s of 8\nmore\nend\n")
    assert not re.fullmatch(pattern(lines), "decode 12.5 tokens/s of 7\nmore\n")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose models/ and ./run are its own; all else, what is built included, is this one's."""
    if SANITIZE == "1":
        pytest.skip("tiny models take the same paths under the sanitizers")
    here = tmp_path_factory.mktemp("docs")
    (here / "models").mkdir()
    kept = [e for e in ROOT.iterdir() if e.name not in ("models", "run", ".git")]
    for entry in [*kept, *(ROOT / "models").glob("tiny-*"), ROOT / "models" / "models.mk", SMOLLM2]:
        (here / entry.relative_to(ROOT)).symlink_to(entry)
    return here


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_commands(page, checkout):
    for command, lines in commands(page):
        if SMOLLM2.name in command and not SMOLLM2.exists():
            pytest.skip(f"models/{SMOLLM2.name} is not here: `make smollm2` downloads it")
        done = subprocess.run(command, shell=True, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert re.fullmatch(pattern(lines), done.stdout), f"{command}\n{done.stdout}"
        for name in re.findall(r"[\w/-]+\.png", command):
            assert_shown(checkout / name)


def test_the_first_command_needs_no_network(checkout):
    cut = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network can be cut off here: `unshare --map-root-user --net` is not allowed")
    command = [*cut, "make", "run", "ARGS=-q -n 8 --temperature 0"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Once upon a time, there was a little girl named Lily\n"), done.stderr


def assert_shown(picture):
    drawn, shown = (Image.open(path).convert("L") for path in (picture, ROOT / "docs" / "pictures" / picture.name))
    assert drawn.size == shown.size, picture.name
    assert max(ImageStat.Stat(ImageChops.difference(drawn, shown)).mean) < 1, picture.name  # of 255: rounding, no more


def test_drawn_pictures(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", tmp_path], check=True)
    for picture in tmp_path.iterdir():
        assert_shown(picture)
