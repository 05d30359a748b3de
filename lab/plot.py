"""Tables and pictures of the lab's results: FOLDER/lab.json -> FOLDER/lab.md and its .png files.

usage: plot.py FOLDER                                                                    (make lab calls it)

Figures are medians of the rounds. Solid lines with marks were measured; dashed ones are the speed calculation
(./run --estimate), made beside each run.
"""

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


def panels(names: list[str]) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, len(names), figsize=(1 + 4 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


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
    """The naive kernel beside flash: time of a prompt, memory beside weights and cache."""
    points = some(points, kind="prompt")
    figure, (time, memory) = panels(["time of a prompt", "activations, 512 tokens a step"])
    for kernel, color in KERNELS.items():
        curve(time, some(points, kernel=kernel), "size", "seconds of the prompt", "o-", color)
        curve(memory, some(points, kernel=kernel), "size", "activation bytes", "o-", color, 1e6)
    for axis in (time, memory):
        powers_of_two(axis, [p["size"] for p in points])
        axis.set_xlabel("prompt, tokens")
    decades(time)
    time.set_ylabel("seconds")
    memory.set_ylabel("MB")
    from_zero(memory)
    legend(figure, KERNELS, calculated=False)
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


def table(points: list[dict]) -> list[str]:
    figures = [name for name in points[0] if name not in ("kind", "round", "seconds")]
    rows = [[f"{p[f]:.4g}" if isinstance(p[f], float) else str(p[f]) for f in figures] for p in points]
    return ["| " + " | ".join(cells) + " |" for cells in (figures, ["---"] * len(figures), *rows)]


def markdown(results: dict, points: list[dict], pictures: dict) -> str:
    lines = ["# The lab's results", "", *(f"- {name}: {value}" for name, value in results["machine"].items())]
    lines += [f"- rounds: {max(record['round'] for record in results['points']) + 1}, medians of them", ""]
    lines += [error(points, expected) + "\n" for expected in ("estimated tokens/s", "reported tokens/s")]
    for name, title in pictures.items():
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    for kind in sorted({point["kind"] for point in points}):
        lines += [f"## {kind}", "", *table(some(points, kind=kind)), ""]
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1])
    results = json.loads((folder / "lab.json").read_text())
    points = medians(results["points"])
    kinds = {point["kind"] for point in points}
    pictures = {name: title for name, (_, title, needs) in PICTURES.items() if needs <= kinds}
    for name in pictures:
        figure = PICTURES[name][0](points)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    (folder / "lab.md").write_text(markdown(results, points, pictures))
    print("written:", folder / "lab.md", *(f"{name}.png" for name in pictures))


if __name__ == "__main__":
    main()
