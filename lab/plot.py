"""Tables and pictures of results: FOLDER/lab.json and gpu.json -> FOLDER/lab.md and gpu.md, and their .png files.

usage: plot.py FOLDER                                                                    (make lab calls it)

The lab's figures are medians of the rounds; gpu.json is what gpu.py has found on a GPU. Lines with marks were measured;
dashed ones without are the speed calculation (./run --estimate), made beside each run.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

FIELDS = ("kind", "model", "cache", "kernel", "size")
COLORS = {"mha": "#e45756", "gqa": "#4c78a8", "mqa": "#72a98f", "mla": "#8e6bb0"}
CACHES = {"contiguous": "tab:blue", "paged": "tab:orange"}
KERNELS = {"naive": "tab:blue", "flash": "tab:orange"}
FAMILIES = {"tiny": "the bundled models", "smollm2": "SmolLM2-135M", "wide": "random weights, about 100 MB"}
LARGE = 50e6  # bytes of weights from which on no cache holds them and the calculation is to be right


def medians(records: list[dict]) -> list[dict]:
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in FIELDS), []).append(record)
    result = []
    for key, rounds in sorted(groups.items()):
        figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0] if name not in FIELDS}
        result.append(dict(zip(FIELDS, key, strict=True)) | figures)
    return result


def some(points: list[dict], **wanted) -> list[dict]:
    return [point for point in points if all(point[field] == value for field, value in wanted.items())]


def family(point: dict) -> str:
    return point["model"].split("-")[0]


def attention(point: dict) -> str:
    return point["model"].split("-")[1]


# ---- Pictures


def curve(axes: Axes, points: list[dict], x: str, y: str, style: str, color: str, unit: float = 1) -> None:
    points = sorted(points, key=lambda point: point[x])
    axes.plot([point[x] for point in points], [point[y] / unit for point in points], style, color=color)


def legend(figure: plt.Figure, colors: dict, calculated: bool = True) -> None:
    lines = [Line2D([], [], color=color, label=name, linewidth=4) for name, color in colors.items()]
    lines += [Line2D([], [], color="gray", marker="o", label="measured")]
    lines += [Line2D([], [], color="gray", linestyle="--", label="calculated")] if calculated else []
    figure.legend(handles=lines, loc="outside lower center", ncols=2 * len(figure.axes))


def powers_of_two(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(ticks)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.minorticks_off()


def decades(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()


def from_zero(axes: Axes) -> None:
    axes.set_ylim(0, 1.08 * max(y for line in axes.lines for y in line.get_ydata()))


def panels(names: list[str], columns: int = 3) -> tuple[plt.Figure, list[Axes]]:
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1 + 4 * columns, 4 * rows), squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes[: len(names)]


def decode_picture(points: list[dict]) -> plt.Figure:
    """tokens/s against the context, a line for each variant."""
    points = some(points, kind="decode", cache="contiguous", kernel="flash")
    names = [name for name in FAMILIES if any(family(point) == name for point in points)]
    figure, axes = panels([FAMILIES[name] for name in names])
    for axis, name in zip(axes, names, strict=True):
        mine = [point for point in points if family(point) == name]
        for variant in COLORS:
            line = [point for point in mine if attention(point) == variant]
            curve(axis, line, "context", "tokens/s", "o-", COLORS[variant])
            curve(axis, line, "context", "estimated tokens/s", "--", COLORS[variant])
        axis.set_xlabel("context, tokens")
        axis.set_xlim(0)
        from_zero(axis)
    axes[0].set_ylabel("decode of one sequence, tokens/s")
    legend(figure, COLORS)
    return figure


def kv_picture(points: list[dict]) -> plt.Figure:
    """Bytes that a token keeps, in 16 bits."""
    points = some(points, kind="decode")
    names = [name for name in FAMILIES if any(family(point) == name for point in points)]
    figure, axes = panels([FAMILIES[name] for name in names])
    for axis, name in zip(axes, names, strict=True):
        kept = {attention(p): p["KV bytes a token"] for p in points if family(p) == name}
        variants = [variant for variant in COLORS if variant in kept]
        bars = axis.bar(variants, [kept[v] / 1e3 for v in variants], color=[COLORS[v] for v in variants])
        axis.bar_label(bars, fmt="{:.3g}", padding=2)
        axis.margins(y=0.12)
    axes[0].set_ylabel("KV cache, kB a token (f16)")
    return figure


def memory_picture(points: list[dict]) -> plt.Figure:
    """The cache that sequences take: their own blocks, or all that they may grow to."""
    figure, (axis,) = panels(["SmolLM2-135M, 192 tokens each, of at most 1024"])
    points = some(points, kind="batch")
    for cache, color in CACHES.items():
        curve(axis, some(points, cache=cache), "size", "KV bytes", "o-", color, 1e6)
    powers_of_two(axis, [p["size"] for p in points])
    decades(axis)
    axis.set_xlabel("sequences")
    axis.set_ylabel("KV cache in use, MB")
    legend(figure, CACHES, calculated=False)
    return figure


def kernel_picture(points: list[dict]) -> plt.Figure:
    """The naive kernel beside flash: time of a prompt, memory beside weights and cache.

    On a CPU neither keeps a matrix of scores, a thread of the naive kernel has a row of them: so their memory is the
    same and does not grow. What the matrix would take is drawn beside them.
    """
    points = some(points, kind="prompt")
    figure, (time, memory) = panels(["time of a prompt", "activations, 512 tokens a step"])
    curve(memory, some(points, kernel="flash"), "size", "bytes of all scores", "--", "gray", 1e6)
    for kernel, color in KERNELS.items():
        curve(time, some(points, kernel=kernel), "size", "seconds of the prompt", "o-", color)
        curve(memory, some(points, kernel=kernel), "size", "activation bytes", "o-", color, 1e6)
    for axis in (time, memory):
        powers_of_two(axis, [p["size"] for p in points])
        axis.set_xlabel("prompt, tokens")
    decades(time)
    time.set_ylabel("seconds")
    memory.set_ylabel("MB")
    decades(memory)
    legend(figure, KERNELS | {"all scores of a layer, if they were kept": "gray"}, calculated=False)
    return figure


def batch_picture(points: list[dict]) -> plt.Figure:
    """Tokens/s of all sequences together; beyond the ridge arithmetic is the limit, not memory."""
    points = some(points, kind="batch")
    figure, (axis,) = panels(["SmolLM2-135M, 128 + 64 tokens each"])
    for cache, color in CACHES.items():
        curve(axis, some(points, cache=cache), "size", "tokens/s", "o-", color)
    curve(axis, some(points, cache="paged"), "size", "estimated tokens/s", "--", "gray")  # it knows no cache
    powers_of_two(axis, [p["size"] for p in points])
    axis.set_xlabel("sequences at once")
    axis.set_ylabel("decode of all sequences, tokens/s")
    from_zero(axis)
    if ridge := statistics.median(point["ridge"] for point in points):
        axis.axvline(ridge, color="gray", linestyle=":")
        axis.text(ridge * 1.05, 0, f"ridge: {ridge:.0f}", rotation=90, va="bottom")
    legend(figure, CACHES)
    return figure


PICTURES = {
    "decode": (decode_picture, "Decode against the context: contiguous cache, flash kernel", {"decode"}),
    "kv": (kv_picture, "What a token keeps", {"decode"}),
    "memory": (memory_picture, "Memory against sequences", {"batch"}),
    "kernels": (kernel_picture, "The naive kernel beside flash", {"prompt"}),
    "batch": (batch_picture, "Sequences at once", {"batch"}),
}

# ---- Pictures of a GPU (gpu.py)

SHAPES = {
    "MHA": COLORS["mha"],
    "GQA 8": COLORS["gqa"],
    "MQA": COLORS["mqa"],
    "MLA 16": COLORS["mla"],
    "MLA 128": "#3f2159",
}
LAYOUTS = {"contiguous": ("o-", "attn.cu"), "shuffled": ("s--", "attn.cu, shuffled blocks"), "torch SDPA": ("x:", None)}
SIDES = {"attn.cu": "#4c78a8", "SDPA flash": "#f58518", "SDPA cuDNN": "#54a24b"}
STEPS = {"--bench": ("o-", "#4c78a8"), "one graph": ("s-", "#72a98f"), "launch by launch": ("x-", "#e45756")}
CHECKS = ("checks", "sanitizer")
CALCULATED, SHARE = "calculated", "% of the bandwidth"


def copy_bandwidth(points: list[dict]) -> float:
    return next((point["bytes/s"] for point in points if "bytes/s" in point), 0)


def rate(point: dict) -> float:
    """GB/s of the cache, or TFLOP/s; 0 where it was not measured."""
    work = point["bytes"] / 1e9 if point["part"] == "decode" else point["flop"] / 1e12
    return work / point["seconds"]


def measured(points: list[dict], part: str) -> list[dict]:
    return [point for point in points if point["part"] == part and "not measured" not in point]


def line(axis: Axes, points: list[dict], style: str, color: str) -> None:
    points = sorted(points, key=lambda point: point["context"])
    axis.plot([point["context"] for point in points], [rate(point) for point in points], style, color=color)


def legend_of(figure: plt.Figure, handles: list[Line2D], columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def gpu_decode_picture(points: list[dict]) -> plt.Figure:
    """GB/s of the cache against the context, a panel for each number of sequences; the right scale: % of the copy."""
    bandwidth = copy_bandwidth(points) / 1e9
    points = measured(points, "decode")
    numbers = sorted({point["sequences"] for point in points})
    figure, axes = panels([f"{n} sequence{'s' if n > 1 else ''}" for n in numbers])
    for axis, n in zip(axes, numbers, strict=True):
        for (shape, color), (side, (style, _)) in itertools.product(SHAPES.items(), LAYOUTS.items()):
            line(axis, some(points, sequences=n, what=shape, side=side), style, color)
        powers_of_two(axis, [point["context"] for point in points])
        axis.set_xlabel("context, tokens")
        from_zero(axis)
        if bandwidth:
            axis.set_ylim(0, max(axis.get_ylim()[1], 1.08 * bandwidth))
            axis.axhline(bandwidth, color="gray", linewidth=1)
            right = axis.secondary_yaxis(
                "right", functions=(lambda y: 100 * y / bandwidth, lambda y: y * bandwidth / 100)
            )
            right.set_ylabel("% of a copy's bandwidth" if n == numbers[-1] else "")
    axes[0].set_ylabel("attention of a new token, GB/s")
    handles = [Line2D([], [], color=color, label=name, linewidth=4) for name, color in SHAPES.items()]
    styles = [(style[0], style[1:], label or side) for side, (style, label) in LAYOUTS.items()]
    handles += [Line2D([], [], color="gray", marker=m, linestyle=dashes, label=label) for m, dashes, label in styles]
    legend_of(figure, handles, 4)
    return figure


def gpu_prompt_picture(points: list[dict]) -> plt.Figure:
    points = measured(points, "prompts")
    widths = list(dict.fromkeys(point["what"] for point in points))
    figure, axes = panels([f"heads of {width.removeprefix('d = ')}, causal" for width in widths])
    for axis, width in zip(axes, widths, strict=True):
        for side, color in SIDES.items():
            line(axis, some(points, what=width, side=side), "o-", color)
        powers_of_two(axis, [point["context"] for point in points])
        axis.set_xlabel("prompt, tokens")
        from_zero(axis)
    axes[0].set_ylabel("attention of a prompt, TFLOP/s")
    legend_of(figure, [Line2D([], [], color=c, marker="o", label=side) for side, c in SIDES.items()], 3)
    return figure


def model_curves(points: list[dict], model: str) -> dict[str, dict[int, float]]:
    """Tokens a second against the context, of --bench, of the step both ways, and calculated; --bench's share."""
    curves = {name: {} for name in (*STEPS, CALCULATED, SHARE)}
    for point in some(measured(points, "models"), what=model):
        for test in point.get("tests", []):
            if test["context"] > 0:
                curves["--bench"][test["context"]] = test["tokens_per_second"]
                curves[CALCULATED][test["context"]] = test["predicted_tokens_per_second"]
                curves[SHARE][test["context"]] = test["bandwidth_percent"]
        for step in point.get("steps", []):
            curves["one graph"][step["context"]] = 1 / step["graph"]
            curves["launch by launch"][step["context"]] = 1 / step["launches"]
    return curves


def gpu_model_picture(points: list[dict]) -> plt.Figure:
    models = sorted({point["what"] for point in measured(points, "models")})
    figure, axes = panels(models)
    for i, (axis, model) in enumerate(zip(axes, models, strict=True)):
        curves = model_curves(points, model)
        for name, (style, color) in (STEPS | {CALCULATED: ("--", "gray")}).items():
            axis.plot(list(curves[name]), list(curves[name].values()), style, color=color)
        powers_of_two(axis, [context for curve in curves.values() for context in curve])
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("decode, tokens/s" if i % 3 == 0 else "")
        from_zero(axis)
    handles = [Line2D([], [], color=c, marker=s[0], linestyle=s[1:], label=name) for name, (s, c) in STEPS.items()]
    legend_of(figure, [*handles, Line2D([], [], color="gray", linestyle="--", label=CALCULATED)], 4)
    return figure


GPU_PICTURES = {
    "gpu-decode": (gpu_decode_picture, "Attention of a new token", {"decode"}),
    "gpu-prompts": (gpu_prompt_picture, "Attention of a prompt", {"prompts"}),
    "gpu-models": (gpu_model_picture, "Models of random weights", {"models"}),
}

# ---- Tables


def error(points: list[dict], expected: str) -> str:
    """Of decode points whose weights no cache holds."""
    large = [p for p in some(points, kind="decode", kernel="flash") if p["weight bytes"] >= LARGE]
    if not large:
        return f"{expected}: no point has {LARGE / 1e6:.0f} MB of weights"
    off = statistics.median(abs(p[expected] / p["tokens/s"] - 1) for p in large)
    return (
        f"{expected}: median error {off:.1%} of {len(large)} decode points with {LARGE / 1e6:.0f} MB of weights or more"
    )


def rows_of_table(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def table(points: list[dict]) -> list[str]:
    figures = [name for name in points[0] if name not in ("kind", "round", "seconds")]
    rows = [[f"{p[f]:.4g}" if isinstance(p[f], float) else str(p[f]) for f in figures] for p in points]
    return rows_of_table([figures, ["---"] * len(figures), *rows])


def markdown(results: dict, points: list[dict], pictures: dict) -> str:
    lines = ["# The lab's results", "", *(f"- {name}: {value}" for name, value in results["machine"].items())]
    lines += [f"- rounds: {max(record['round'] for record in results['points']) + 1}, medians of them", ""]
    lines += [error(points, expected) + "\n" for expected in ("estimated tokens/s", "reported tokens/s")]
    for name, title in pictures.items():
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    for kind in sorted({point["kind"] for point in points}):
        lines += [f"## {kind}", "", *table(some(points, kind=kind)), ""]
    return "\n".join(lines)


def gpu_rows(points: list[dict], part: str, sides: tuple) -> list[list[str]]:
    """A row for each case, a cell for each side; of decode with the share of the copy's bandwidth."""
    share = 100e9 / copy_bandwidth(points) if part == "decode" and copy_bandwidth(points) else 0
    cases = dict.fromkeys((p["what"], p["context"], p["sequences"]) for p in points if p["part"] == part)
    rows = []
    for what, context, n in cases:
        mine = some(measured(points, part), what=what, context=context, sequences=n)
        found = {point["side"]: rate(point) for point in mine}
        cells = [f"{found[s]:.4g}" + f" ({share * found[s]:.0f} %)" * bool(share) if s in found else "" for s in sides]
        rows.append([what, str(context), str(n), *cells])
    return rows


def check_rows(points: list[dict]) -> list[list[str]]:
    checks = [point for point in points if point["part"] in CHECKS]
    return [[p["what"], p["side"], "failed" if "failed" in p else p.get("not measured", "passed")] for p in checks]


def model_rows(points: list[dict]) -> list[list[str]]:
    rows = []
    for model in sorted({p["what"] for p in measured(points, "models")}):
        curves = model_curves(points, model)
        for context in sorted({context for curve in curves.values() for context in curve}):
            cells = [f"{curve[context]:.4g}" if context in curve else "" for curve in curves.values()]
            rows.append([model, str(context), *cells])
    return rows


def gpu_markdown(results: dict, points: list[dict], pictures: dict) -> str:
    layouts, case = ("contiguous", "paged", "shuffled", "torch SDPA"), ("context", "sequences")
    tables = {
        "Checks": (["test", "with", "result"], check_rows(points)),
        "Attention of a new token, GB/s (% of the copy)": (
            ["variant", *case, *layouts],
            gpu_rows(points, "decode", layouts),
        ),
        "Attention of a prompt, TFLOP/s": (["heads", *case, *SIDES], gpu_rows(points, "prompts", tuple(SIDES))),
        "Decode of models, tokens/s": (["model", "context", *STEPS, CALCULATED, SHARE], model_rows(points)),
    }
    lines = ["# On a GPU", "", *(f"- {name}: {value}" for name, value in results["machine"].items())]
    lines += [f"- a copy reads and writes {copy_bandwidth(points) / 1e9:.0f} GB/s", ""]
    for name, title in pictures.items():
        lines += [f"![{title}]({name}.png)", ""]
    for title, (head, rows) in tables.items():
        lines += [f"## {title}", "", *rows_of_table([head, ["---"] * len(head), *rows]), ""] if rows else []
    missing = [point for point in points if "not measured" in point and point["part"] not in CHECKS]
    lines += ["## Not measured", ""] if missing else []
    for p in missing:
        lines.append(f"- {p['part']}, {p['what']}, {p['side']}, {p['context']} x {p['sequences']}: {p['not measured']}")
    return "\n".join(lines) + "\n"


# ---- Files


def draw(folder: Path, file: str, points: list[dict], pictures: dict, parts: set[str]) -> dict:
    """The pictures for which there are points; returns their titles by name."""
    titles = {name: title for name, (_, title, needs) in pictures.items() if needs <= parts}
    for name in titles:
        figure = pictures[name][0](points)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    print("written:", folder / file, *(f"{name}.png" for name in titles))
    return titles


def draw_lab(folder: Path) -> None:
    results = json.loads((folder / "lab.json").read_text())
    points = medians(results["points"])
    titles = draw(folder, "lab.md", points, PICTURES, {point["kind"] for point in points})
    (folder / "lab.md").write_text(markdown(results, points, titles))


def draw_gpu(folder: Path) -> None:
    results = json.loads((folder / "gpu.json").read_text())
    points = results["points"]
    parts = {part for part in ("decode", "prompts", "models") if measured(points, part)}
    titles = draw(folder, "gpu.md", points, GPU_PICTURES, parts)
    (folder / "gpu.md").write_text(gpu_markdown(results, points, titles))


def main() -> None:
    folder = Path(sys.argv[1])
    there = [drawn for name, drawn in {"lab": draw_lab, "gpu": draw_gpu}.items() if (folder / f"{name}.json").exists()]
    if not there:
        sys.exit(f"plot.py: {folder} has neither lab.json nor gpu.json")
    for drawn in there:
        drawn(folder)


if __name__ == "__main__":
    main()
