"""What a person at a terminal sees: prompt signs, editing, history, pastes, Ctrl-C."""

import contextlib
import fcntl
import json
import os
import pty
import select
import shlex
import signal
import struct
import termios
import time

import checkpoints
import pytest
from test_run import CHATML, answers, command, export_tiny, run

MARKS, NO_MARKS = b"\x1b[?2004h", b"\x1b[?2004l"  # of pastes: asked for, and not
PASTE, PASTE_ENDS = b"\x1b[200~", b"\x1b[201~"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_tiny("llama_gqa", tmp_path_factory.mktemp("models") / "tiny", CHATML)


class Terminal:
    """The program at a pseudo terminal."""

    def __init__(self, *arguments, binary=None, term="xterm", **more):
        self.shown = b""
        line = binary or command(*arguments, "--threads", 1)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for key, value in more.items():
                os.environ[key] = value
            os.environ["TERM"] = term
            os.execvp(line[0], line)

    def read(self, seconds):
        """What comes next, if it comes in this time; false: nothing."""
        piece = b""
        if select.select([self.fd], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                piece = os.read(self.fd, 65536)
        self.shown += piece
        return bool(piece)

    def until(self, what, seconds=60):
        """Reads until this is shown, after what was seen before; returns what came before it."""
        end = time.monotonic() + seconds
        while what not in self.shown:
            assert time.monotonic() < end, f"{what} is not shown: {self.shown[-500:]}"
            self.read(0.2)
        before, self.shown = self.shown.split(what, 1)
        return before

    def type(self, text):
        for i in range(0, len(text), 512):  # the terminal's own buffer is small
            os.write(self.fd, text[i : i + 512])
            self.read(0)

    def end(self, seconds=60):
        """The exit code."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self.read(0):
                    pass
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, f"it does not end: {self.shown[-500:]}"
            self.read(0.05)

    def echoes(self):
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)


def chat_stats(model, tmp_path, typed, *flags):
    """The statistics of a chat of one turn, typed."""
    path = tmp_path / "stats.json"
    t = Terminal(model, "--chat", "-n", 1, "--temperature", 0, "-q", "--stats", path, *flags)
    t.until(b"> ")
    t.type(typed)
    t.type(b"\r")
    t.until(b"\n")
    t.until(b"> ")
    t.type(b"\x04")
    assert t.end() == 0
    return json.loads(path.read_text())


def same_as(model, content):
    request = {"messages": [{"role": "user", "content": content}], "n": 1, "temperature": 0}
    return answers(model, stdin=json.dumps(request))[0]


@pytest.mark.parametrize(
    ("typed", "content"),
    [
        (b"hello", "hello"),
        (b"helXo\x1b[D\x7fl", "hello"),  # left, delete the character before
        ("größer 世界 😀".encode(), "größer 世界 😀"),
        ("é€😀".encode() + b"\x7f\x7f", "é"),
        (b"a\tb", "a\tb"),
        (b"n\xe9!", "n\ufffd!"),
        (PASTE + b"one\rtwo\nthree" + PASTE_ENDS, "one\ntwo\nthree"),
        (b"see: " + PASTE + b"one\r\ttwo\r" + PASTE_ENDS + b" end", "see: one\n\ttwo end"),
        (b"one\\\rtwo", "one\ntwo"),
        (PASTE + b"x" * 150 + PASTE_ENDS, "x" * 150),
    ],
)
def test_a_turn_as_it_is_typed(model, tmp_path, typed, content):
    """The hash of the logits is of all that the model was given."""
    asked = same_as(model, content)
    s = chat_stats(model, tmp_path, typed)
    assert (s["prompt_tokens"], s["logits_hash"]) == (asked["prompt_tokens"], asked["logits_hash"])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("end", [b"\r", b"\n"])
def test_a_long_line_arrives_whole(tmp_path, early, end):
    """Even where it is typed before the program asks for it: a terminal that edits lines itself keeps 4095 bytes."""
    weights = export_tiny("llama_gqa", tmp_path / "plain")
    typed = b"word " * 1999 + b"last"
    t = Terminal(weights, "-n", 1, "-q")
    if not early:
        t.until(b"ended by Ctrl-D")
        t.until(b"\n")
    while t.echoes():
        t.read(0.01)
    t.type(typed + end)
    t.type(b"\x04")
    assert t.end() == 1
    assert f"the prompt has {len(typed)} tokens".encode() in t.shown.replace(b"\r\n", b"\n"), t.shown[-300:]


def test_history(model, tmp_path):
    t = Terminal(model, "--chat", "-n", 1, "--temperature", 0, "-q")
    for keys, line in (
        (b"first", b"first"),
        (b"second", b"second"),
        (b"\x1b[A\x1b[A", b"first"),
        (b"\x10\x10!", b"second!"),
    ):
        t.until(b"> ")
        t.type(keys)
        t.until(line)
        t.type(b"\r")
        t.until(b"\n")
    t.until(b"> ")
    t.type(b"\x04")
    assert t.end() == 0


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """The tiny model with so long a context that an answer only ends by Ctrl-C."""
    reference = checkpoints.load("llama_gqa")
    reference["config"]["max_position_embeddings"] = 1 << 20
    folder = tmp_path_factory.mktemp("models") / "talkative"
    return export_tiny(reference, folder, CHATML)


def test_ctrl_c_ends_the_answer_and_then_the_chat(talkative, tmp_path):
    """While an answer waits for the terminal to show it, too."""
    t = Terminal(talkative, "--chat", "--ignore-eos", "-c", 0, "--stats", tmp_path / "stats.json")
    for _ in range(3):
        t.until(b"> ")
        t.type(b"hi\r")
        t.until(b"hi\r\n")
        t.read(60)
        t.type(b"\x03")
    t.until(b"> ")
    t.type(b"half a line\x03")
    assert t.end() == 130
    assert b"logits   hash" in t.shown
    assert json.loads((tmp_path / "stats.json").read_text())["generated_tokens"] >= 3


def test_a_line_goes_on_after_ctrl_z(model, tmp_path):
    """The shell has the terminal meanwhile, and leaves it in its own mode."""
    t = Terminal(model, "--chat", "-n", 1, "--temperature", 0, "-q", "--stats", tmp_path / "stats.json")
    shell = termios.tcgetattr(t.fd)
    shell[3] |= termios.ECHO | termios.ICANON
    t.until(b"> ")
    t.type(b"helloX")
    t.until(b"helloX")
    os.kill(t.pid, signal.SIGSTOP)
    os.waitpid(t.pid, os.WUNTRACED)
    termios.tcsetattr(t.fd, termios.TCSANOW, shell)
    os.kill(t.pid, signal.SIGCONT)
    t.until(b"> helloX")
    t.type(b"\x7f!\r")
    t.until(b"> ")
    t.type(b"\x04")
    assert t.end() == 0
    s, asked = json.loads((tmp_path / "stats.json").read_text()), same_as(model, "hello!")
    assert (s["prompt_tokens"], s["logits_hash"]) == (asked["prompt_tokens"], asked["logits_hash"])


def test_a_line_goes_on_in_a_shell_with_jobs(model, tmp_path):
    """Ctrl-Z and fg, typed."""
    line = command(
        model, "--chat", "-n", 1, "--temperature", 0, "-q", "--threads", 1, "--stats", tmp_path / "stats.json"
    )
    t = Terminal(binary=("bash", "--norc", "-i"), PS1="$ ")
    t.until(b"$ ")
    t.type(shlex.join(map(str, line)).encode() + b"\n")
    t.until(MARKS + b"> ")
    t.type(b"helloX")
    t.until(b"helloX")
    t.type(b"\x1a")
    t.until(b"Stopped")
    t.until(b"$ ")
    t.type(b"fg\n")
    t.until(b"> helloX")
    t.type(b"\x7f!\r")
    t.until(b"> ")
    t.type(b"\x04")
    t.until(b"$ ")
    t.type(b"exit $?\n")
    assert t.end() == 0
    assert json.loads((tmp_path / "stats.json").read_text())["logits_hash"] == same_as(model, "hello!")["logits_hash"]


def test_a_line_fits_the_window_when_its_size_changes(model):
    t = Terminal(model, "--chat", "-n", 1, "-q")
    t.until(b"> ")
    t.type(b"x" * 30)
    t.until(b"x" * 30)
    fcntl.ioctl(t.fd, termios.TIOCSWINSZ, struct.pack("4H", 24, 20, 0, 0))
    t.until(b"> " + b"x" * 18)  # the first of two rows
    t.until(b"x" * 12)
    t.type(b"\x03")
    assert t.end() == 130


def test_the_terminal_is_left_as_it_was(model, tmp_path):
    for end in (b"\x04", b"\x03", signal.SIGTERM, signal.SIGHUP):
        t = Terminal(model, "--chat", "-q", "--stats", tmp_path / "stats.json")
        before = termios.tcgetattr(t.fd)
        t.until(b"> ")
        assert not t.echoes()
        t.type(end) if isinstance(end, bytes) else os.kill(t.pid, end)
        assert t.end() == {b"\x04": 0, b"\x03": 130}.get(end, -end if isinstance(end, int) else None)
        assert termios.tcgetattr(t.fd) == before
        assert NO_MARKS in t.shown and MARKS not in t.shown, "pastes are no longer marked"
        assert not (tmp_path / "stats.json").exists() or isinstance(end, bytes)
        (tmp_path / "stats.json").unlink(missing_ok=True)
        os.close(t.fd)


def test_the_prompt_sign_is_no_part_of_the_output(model, tmp_path):
    """Output in a file: the terminal shows the signs, the file has the answers."""
    line = command(model, "--chat", "-n", 4, "--temperature", 0, "-q", "--threads", 1)
    pid, fd = pty.fork()
    if pid == 0:
        os.dup2(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT), 1)
        os.execv(line[0], line)
    t = Terminal.__new__(Terminal)
    t.pid, t.fd, t.shown = pid, fd, b""
    t.until(b"> ")
    t.type(b"hello\r")
    t.until(b"> ")
    t.type(b"\x04")
    assert t.end() == 0
    assert (tmp_path / "out").read_bytes() == run(*line[1:-2], stdin=b"hello\n").stdout


@pytest.mark.parametrize("term", ["dumb", "", "no-such-terminal"])
def test_any_terminal_will_do(model, tmp_path, term):
    t = Terminal(model, "--chat", "-n", 1, "-q", term=term)
    t.until(b"> ")
    t.type(b"hello\r")
    t.until(b"hello")
    t.until(b"> ")
    t.type(b"\x04")
    assert t.end() == 0


def test_a_line_of_requests_typed_at_a_terminal_is_refused_where_it_may_be_cut(model):
    t = Terminal(model, "--prompts", "-", "-q")
    t.type(b'{"prompt": "' + b"x" * 6000 + b'"}')
    t.type(b"\n")
    t.until(b'"error"')
    t.type(b"\x04\x04")
    assert t.end() in (0, 1)
