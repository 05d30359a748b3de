"""The chapters as one page that needs nothing else: page.py OUT.html CHAPTER.md ..., with their pictures inside.

A link from one chapter to another leads within the page; any other is as good there as in the chapter, since the page
lies in the same folder.
"""

import base64
import mimetypes
import re
import sys
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 17px/1.55 Georgia, serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { margin-top: 4rem; border-bottom: 2px solid #1b1b1b; }
h1, h2, nav, table { font-family: "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
table { border-collapse: collapse; font-size: 15px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
pre { background: #f5f5f2; padding: .75rem; overflow-x: auto; line-height: 1.35; }
pre, code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; }
p, li { max-width: 52rem; }
p:has(img) { max-width: 62rem; }
img { max-width: 100%; display: block; margin: 1rem 0; }
"""


def inside(folder: Path, name: str) -> str:
    data = base64.b64encode((folder / name).read_bytes()).decode()
    return f'src="data:{mimetypes.guess_type(name)[0]};base64,{data}"'


def section(chapter: Path, names: set[str]) -> str:
    html = MarkdownIt("commonmark").enable("table").render(chapter.read_text())
    html = re.sub(r'src="([^":]+)"', lambda found: inside(chapter.parent, found[1]), html)
    html = re.sub(r'href="([^"#]+)(#[^"]*)?"', lambda f: f'href="#{f[1]}"' if f[1] in names else f[0], html)
    return f'<section id="{chapter.name}">\n{html}</section>\n'


def page(chapters: list[Path]) -> str:
    titles = [(chapter.name, chapter.read_text().splitlines()[0].removeprefix("# ")) for chapter in chapters]
    contents = "".join(f'<div><a href="#{name}">{escape(title)}</a></div>\n' for name, title in titles)
    sections = "".join(section(chapter, {name for name, _ in titles}) for chapter in chapters)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Transformer attention variants, in code that runs</title>\n<style>{STYLE}</style>\n"
        f"<nav>\n{contents}</nav>\n{sections}</html>\n"
    )


if __name__ == "__main__":
    out, *chapters = map(Path, sys.argv[1:])
    out.write_text(page(chapters))
