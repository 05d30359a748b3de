"""What the chapters and the README say holds: links lead somewhere, commands print what stands below them."""

import re
import subprocess

import pytest
from conftest import ROOT, SANITIZE, export, run_binary

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "SmolLM2-135M-Instruct.Q4_1"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def commands(page):
    """[(command, the lines below it)]: `    $ command`, and the indented lines that follow."""
    found = re.findall(r"^ {4}\$ (.*)\n((?: {4}(?!\$ ).*\n)*)", page.read_text(), re.MULTILINE)
    return [(command, [line[4:] for line in lines.splitlines()]) for command, lines in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where ./run and models/ are, and what the commands write."""
    source = ROOT / "models" / f"{MODEL}.gguf"
    if not source.exists():
        pytest.skip(f"models/{source.name} is not here: `make run` downloads it")
    if SANITIZE == "1":
        pytest.skip("tiny models take the same paths under the sanitizers")
    here = tmp_path_factory.mktemp("docs")
    (here / "models").mkdir()
    export(source, here / "models" / f"{MODEL}.safetensors")
    (here / "run").symlink_to(run_binary())
    return here


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_commands(page, folder):
    for command, lines in commands(page):
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert [line.rstrip() for line in done.stdout.splitlines()] == lines, command
