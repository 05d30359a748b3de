"""The lab: what is measured, kept and gone on with; its pictures, from stored results (tests/data/lab.json)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, exported, run_binary
from PIL import Image

sys.path.insert(0, str(ROOT / "lab"))
import plot
import random_model
from matplotlib.text import Text

import lab

STORED = ROOT / "tests" / "data" / "lab.json"
RESULTS = json.loads(STORED.read_text())
POINTS = [lab.Point("decode", "smollm2-gqa", "contiguous", "flash", size) for size in (1, 2, 3)]
FIGURES = {name: 1.0 for name in RESULTS["points"][0] if name.endswith(("/s", "bytes", "token", "context"))}


# ---- What is measured


def test_every_variant_cache_and_kernel_is_a_point():
    points = lab.points(quick=False)
    assert len(set(points)) == len(points) > 3 * len(lab.points(quick=True))
    decode = {(p.model, p.cache, p.kernel) for p in points if p.kind == "decode"}
    models = [f"{family}-{attention}" for family in ("tiny", "wide") for attention in ("mha", "mqa", "gqa", "mla")]
    for model in (*models, "smollm2-gqa", "smollm2-mha", "smollm2-mla"):
        assert {(model, c, k) for c in ("contiguous", "paged") for k in ("flash", "naive")} <= decode


@pytest.mark.parametrize("attention", random_model.KV_HEADS)
def test_random_models_are_what_the_exporter_expects(attention, tmp_path):
    """As many parameters, and a latent of 4 heads of 64 and a rotated key of 32, or so many KV heads of 64."""
    (tmp_path / "config.json").write_text(json.dumps(random_model.config(attention, 4096, 0, 0)))
    shapes = exported(tmp_path / "config.json", tmp_path / "x.safetensors", "q8_0")
    command = [run_binary(), shapes, "--estimate", "--gpu", "l4", "-q", "--stats", "-"]
    report = json.loads(subprocess.run([str(a) for a in command], capture_output=True, check=True).stdout)
    own = next(v for v in report["variants"] if v["own"])
    sizes = [a * (b[0] if b else 1) for a, *b in random_model.shapes(attention, 4096, 0).values()]
    assert own["attention"] == attention and own["parameters"] == pytest.approx(sum(sizes), rel=1e-4)  # RoPE's table
    kept = {"mha": 16 * 128, "gqa": 4 * 128, "mqa": 128, "mla": 4 * 64 + 32}[attention]
    assert own["kv_bytes_per_token"] == 2 * 6 * kept and own["weight_bytes_per_step"] > plot.LARGE


# ---- What is kept


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The lab with three points that take no time; returns a function that runs it, and what was measured."""
    measured = []
    monkeypatch.setattr(lab, "points", lambda quick: POINTS)
    monkeypatch.setattr(lab, "model_file", lambda name: tmp_path)
    monkeypatch.setattr(lab, "binary", lambda weights, **choices: tmp_path)
    monkeypatch.setitem(lab.MEASURE, "decode", lambda point, weights: measured.append(point) or FIGURES)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path / "out"), *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            lab.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run, measured


def kept(folder):
    return [lab.done(record) for record in json.loads((folder / "lab.json").read_text())["points"]]


def kept_points(folder):
    return [point for _, point in kept(folder)]


def test_an_interrupted_lab_goes_on_where_it_was(fake, monkeypatch, tmp_path, capsys):
    run, measured = fake

    def interrupted(point, weights):
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measured.append(point) or FIGURES

    monkeypatch.setitem(lab.MEASURE, "decode", interrupted)
    with pytest.raises(SystemExit) as end:
        run("--rounds", 2)
    assert end.value.code == 130 and len(kept(tmp_path / "out")) == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith("lab: interrupted")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lab.json"]

    monkeypatch.setitem(lab.MEASURE, "decode", lambda point, weights: measured.append(point) or FIGURES)
    run("--rounds", 2)
    assert sorted(measured) == sorted(POINTS * 2)  # each once a round
    assert sorted(kept(tmp_path / "out")) == sorted((number, point) for number in (0, 1) for point in POINTS)
    assert "lab: left: 1, " in capsys.readouterr().err
    run("--rounds", 2)
    assert len(measured) == 6


def test_no_point_begins_after_its_minutes(fake, monkeypatch, tmp_path, capsys):
    run, measured = fake
    clock = iter(range(0, 10**6, 25))  # a step is 25 s: a point begins at 50 s, the next at 125 s
    monkeypatch.setattr(lab.time, "monotonic", lambda: next(clock))
    run("--minutes", 1)
    assert measured == kept_points(tmp_path / "out") and len(measured) == 1
    assert "lab: 1 minutes are over, left: 2; the same command goes on" in capsys.readouterr().err
    run()
    assert sorted(measured) == sorted(POINTS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_results_and_no_process(number, tmp_path):
    """While a program runs: it writes its process's number, and would take a minute."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "lab")!r})
import lab
lab.points = lambda quick: [lab.Point("decode", "a-b", "c", "d", size) for size in (1, 2)]
lab.model_file = lab.binary = lambda *_, **choices: None
calls = []
def decode(point, weights):
    calls.append(point)
    if len(calls) == 2:
        lab.output("sh", "-c", "echo $$ >{tmp_path}/pid; exec sleep 60")
    return dict()
lab.MEASURE = dict(decode=decode)
sys.argv = ["lab.py", "--out", {str(tmp_path / "out")!r}]
lab.main()
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30  # before the program would end by itself
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1].startswith("lab: interrupted")
    assert len(kept(tmp_path / "out")) == 1 and not list((tmp_path / "out").glob("*.partial"))
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.01)
        pytest.fail("the program outlives the lab")


def test_results_of_another_machine_or_program_are_not_mixed_in(fake, tmp_path, capsys):
    run, measured = fake
    run()
    path = tmp_path / "out" / "lab.json"
    results = json.loads(path.read_text())
    for field in ("cpu", "attn.cu"):
        path.write_text(json.dumps(results | {"machine": results["machine"] | {field: "another"}}))
        with pytest.raises(SystemExit) as end:
            run()
        assert str(path) in end.value.code and f"of {field} another, here is" in end.value.code
    changed = results["machine"]["attn.cu"].removesuffix("-dirty") + "-dirty"  # its own results are a change, too
    path.write_text(json.dumps(results | {"machine": results["machine"] | {"attn.cu": changed}}))
    run()
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--rounds", "0"], 2, "lab.py: argument --rounds: '0' must be a whole number > 0: see lab.py --help"),
        (["--rounds", "nan"], 2, "lab.py: argument --rounds: 'nan' must be a whole number > 0: see lab.py --help"),
        (["--minutes", "0"], 2, "lab.py: argument --minutes: '0' must be a whole number > 0: see lab.py --help"),
        (["--fast"], 2, "lab.py: unrecognized arguments: --fast: see lab.py --help"),
        (["more"], 2, "lab.py: unrecognized arguments: more: see lab.py --help"),
        (["--out"], 2, "lab.py: argument --out: expected one argument: see lab.py --help"),
        (["--out", "FILE/x"], 1, "lab: FILE/x/lab.json: Not a directory: give --out a folder that can be written"),
        (["--out", "DAMAGED"], 1, "lab: DAMAGED/lab.json: not the lab's results"),
        (["--out", "OTHER"], 1, "lab: OTHER/lab.json: not the lab's results"),
    ],
)
def test_wrong_input_is_one_line(arguments, code, line, tmp_path):
    (tmp_path / "FILE").touch()
    for name, text in (("DAMAGED", '{"machine": {'), ("OTHER", '{"machine": {}, "points": [{"kind": "decode"}]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lab.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "lab" / "lab.py"), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code and done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


# ---- Pictures


def drawn(folder, page, names):
    """The text of the page that lab/plot.py makes of the figures; it shows these pictures, none of them empty."""
    subprocess.run([sys.executable, str(ROOT / "lab" / "plot.py"), str(folder)], check=True)
    text = (folder / page).read_text()
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width >= 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
        assert f"({name}.png)" in text
    return text


def test_pictures_and_tables_are_made(tmp_path):
    (tmp_path / "lab.json").write_text(STORED.read_text())
    page = drawn(tmp_path, "lab.md", plot.PICTURES)
    # 14 large points, a median of 3 rounds among them: of these errors the 7th and 8th
    assert "estimated tokens/s: median error 11.1%" in page


def test_curves_are_the_medians():
    """Of three rounds at 356.4, 392.0 and 285.1 tokens/s, and calculated with the first one."""
    rounds = [r for r in RESULTS["points"] if r["kind"] == "decode" and r["model"] == "smollm2-gqa"]
    assert sorted(r["tokens/s"] for r in rounds if r["size"] == 128) == [285.1, 356.4, 392.0]
    figure = plot.decode_picture(plot.medians(RESULTS["points"]))
    assert [axis.get_title() for axis in figure.axes] == list(plot.FAMILIES.values())
    measured = next(
        line for line in figure.axes[1].lines if line.get_color() == plot.COLORS["gqa"] and line.get_marker() == "o"
    )
    assert list(measured.get_xdata()) == [192, 1088, 4160] and measured.get_ydata()[0] == 356.4


def assert_texts_apart(figure):
    """And within the picture."""
    figure.canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    axes = [axis for own in figure.axes for axis in (own, *own.child_axes)]
    for axis in axes:  # ticks beyond the axes' ends are not drawn
        (low, high), (bottom, top) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
        for which, first, last in ((axis.xaxis, low, high), (axis.yaxis, bottom, top)):
            for tick in which.get_major_ticks() + which.get_minor_ticks():
                if not first <= tick.get_loc() <= last:
                    hidden = {id(tick.label1), id(tick.label2)}
                    boxes = [box for t, box in zip(texts, boxes, strict=True) if id(t) not in hidden]
                    texts = [t for t in texts if id(t) not in hidden]
    assert len(boxes) > 10
    whole = figure.bbox
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text
        for other, its in boxes[i + 1 :]:
            assert not box.overlaps(its), (text, other)


@pytest.mark.parametrize("name", plot.PICTURES)
def test_texts_are_within_the_picture_and_apart(name):
    assert_texts_apart(plot.PICTURES[name][0](plot.medians(RESULTS["points"])))
