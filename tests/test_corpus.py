"""models/corpus.py: what becomes of an answer, and what of a wrong file."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = ROOT / "models/corpus.py"
SENTENCES = [
    "One day a small fox found a red ball under the old tree near the river.",
    "He took it home and showed it to his mother, who was very happy.",
    "Then they went to see the bear, because he liked to play in the garden.",
    "The bear said that a duck had lost her ball when it rained last night.",
    "So all of them walked down to the lake and gave it back to her.",
]
STORY = " ".join(SENTENCES)


def corpus(*arguments, code=0):
    done = subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def filtered(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return corpus("filter", path).split("\n\n")[:-1]


def often(text):
    """It and four stories with the same words, which are then not rare."""
    return [text, *(" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in (1, 2, 3, 4))]


@pytest.mark.parametrize(
    "answer, story",
    [
        (STORY, STORY),
        (STORY + " Then the fo", STORY),  # cut off by the limit of tokens
        (STORY + ' The fox said, "A ball. A red', STORY),
        (STORY.replace(". ", ".  \n\n ", 1), STORY.replace(". ", ".\n", 1)),
        (STORY.replace("small", "\u201csmall\u201d"), STORY.replace("small", '"small"')),
        ("Hello children. " + STORY, None),
        (STORY + " *smiles*", None),
        (STORY + " The 2 friends played.", None),
        (STORY + " " + SENTENCES[1], None),  # told again
        (STORY + " " + SENTENCES[0], STORY + " " + SENTENCES[0]),  # but for the first
        (SENTENCES[0], None),  # too short
        (STORY.replace("fox", "wombat"), None),  # a word that no other story has
    ],
)
def test_filter(answer, story, tmp_path):
    kept = filtered(tmp_path / "answers", often(answer))
    assert kept == [text for text in often(story) if text]


def test_each_story_once(tmp_path):
    assert filtered(tmp_path / "answers", often(STORY) * 2) == often(STORY)


def test_requests_are_the_same_each_time():
    first = corpus("requests", 50)
    assert first == corpus("requests", 50) and corpus("requests", 10) == "".join(first.splitlines(True)[:10])
    request = json.loads(first.splitlines()[7])
    assert request["seed"] == 7 and request["messages"][1]["content"].startswith("Tell me a story about ")


def test_wrong_input_is_one_line(tmp_path):
    (tmp_path / "answers").write_text('{"text": "x"}\nno JSON\n')
    assert f"{tmp_path / 'answers'}, line 2" in corpus("filter", tmp_path / "answers", code=1)
    assert corpus("filter", tmp_path / "none", code=1).count("\n") == 1
    for arguments in ((), ("requests",), ("requests", "many"), ("filter",)):
        assert corpus(*arguments, code=2).startswith("usage: ")
