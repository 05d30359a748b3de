"""Draws the chapters' diagrams and plots: pictures.py FOLDER. The figures in them are computed here from the shapes, by
the formulas of the chapters."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

QUERY, KEY, VALUE, LATENT, EMPTY = "#4c78a8", "#e45756", "#f2a33a", "#72a98f", "#ececec"
VARIANTS = {"MHA": "#e45756", "GQA": "#4c78a8", "MQA": "#72a98f", "MLA": "#8e6bb0"}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def canvas(width, height, columns=1):
    """Plain drawing areas, in units of which `width` / `columns` x `height` make one."""
    figure, areas = plt.subplots(1, columns, figsize=(10, 10 * height / width), squeeze=False)
    for area in areas[0]:
        area.set(xlim=(0, width / columns), ylim=(0, height), aspect="equal")
        area.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    return figure, areas[0]


def box(area, x, y, width, height, text="", color=EMPTY, size=11):
    area.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))
    ink = "black" if color in (EMPTY, "white", VALUE) else "white"
    area.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=ink)


def arrow(area, start, end, color="#555555", **style):
    area.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.2} | style)


def heads(area, x, y, n_heads, n_kv_heads, title):
    """Query heads above, the KV heads whose rows they read below."""
    area.text(x + n_heads / 2, y + 4.6, title, ha="center", size=13)
    group = n_heads / n_kv_heads
    for h in range(n_heads):
        box(area, x + h + 0.1, y + 3, 0.8, 0.8, f"q{h}", QUERY, 10)
        g = int(h // group)
        arrow(area, (x + h + 0.5, y + 2.95), (x + (g + 0.5) * group, y + 1.75))
    for g in range(n_kv_heads):
        middle = x + (g + 0.5) * group
        box(area, middle - 0.4, y + 0.9, 0.8, 0.8, f"k{g}", KEY, 10)
        box(area, middle - 0.4, y + 0.1, 0.8, 0.8, f"v{g}", VALUE, 10)


def cache():
    """SmolLM2 in 5 bits: 97 MB of weights, and 2 x 30 x G x 64 x 2 bytes of cache a token."""
    weights, tokens = 97, [0, 8192]
    figure, axes = plt.subplots(figsize=(10, 4.5))
    axes.fill_between(tokens, [0, 0], [weights] * 2, color=EMPTY)
    axes.text(4096, weights / 2, "97 MB of weights, read in every step", ha="center", va="center")
    for name, n_kv_heads, color in (
        ("as it is, 3 KV heads", 3, VARIANTS["GQA"]),
        ("with 9 KV heads", 9, VARIANTS["MHA"]),
    ):
        a_token = 2 * 30 * n_kv_heads * 64 * 2
        read = [weights + n * a_token / 1e6 for n in tokens]
        axes.plot(tokens, read, color=color, linewidth=2)
        axes.text(8300, read[1], f"{name}:\n{a_token:,} bytes a token", va="center", color=color)
    axes.set(xlim=(0, 10_500), ylim=(0, 700), xlabel="tokens of context", ylabel="MB that a step reads")
    axes.set_xticks(range(0, 8193, 1024))
    figure.tight_layout()
    return figure


def roofline():
    """Llama 3 8B in 16 bits on an L4: the matrices' FLOP a byte are the rows of activations that share a step."""
    flops, bandwidth = 121e12, 300e9
    figure, axes = plt.subplots(figsize=(10, 5))
    intensity = [0.25, flops / bandwidth, 4096]
    axes.loglog(intensity, [min(flops, x * bandwidth) / 1e12 for x in intensity], color="black", linewidth=2)
    axes.axvline(flops / bandwidth, color="#bbbbbb", linestyle="--", linewidth=1)
    axes.text(flops / bandwidth * 1.08, 0.12, "ridge point: 403 FLOP a byte")
    axes.text(1500, 138, "121 TFLOP/s", ha="center")
    axes.text(20, 8.2, "300 GB/s", ha="center", rotation=33, rotation_mode="anchor")
    points = (
        (1, "decode, 1 sequence", QUERY),
        (16, "decode, 16 sequences: the matrices", QUERY),
        (512, "512 tokens of a prompt", LATENT),
        (1.02, "attention of MHA, any number of sequences", KEY),
        (4, "attention of GQA: 4 heads a row", KEY),
    )
    for x, label, color in points:
        y = min(flops, x * bandwidth) / 1e12
        axes.plot(x, y, "o", color=color, markersize=8)
        if x == 1:
            axes.annotate(label, (x, y), (-8, 8), textcoords="offset points", ha="right", color=color)
        else:
            axes.annotate(label, (x, y), (10, -12), textcoords="offset points", color=color)
    axes.set(xlim=(0.05, 6000), ylim=(0.08, 300), xlabel="FLOP a byte", ylabel="TFLOP/s")
    figure.tight_layout()
    return figure


def mqa():
    figure, (area,) = canvas(20, 5.6)
    heads(area, 1, 0.3, 8, 8, "MHA: 8 query heads, 8 KV heads")
    heads(area, 11, 0.3, 8, 1, "MQA: 8 query heads, 1 KV head")
    area.plot([10, 10], [0.4, 5], color="#bbbbbb", linewidth=1)
    return figure


def gqa():
    """Llama 3 8B on an L4: weights of 15 GB at 300 GB/s, and 24 - 16 GB for the cache."""
    weights, bandwidth, room = 15.0e9, 300e9, 8e9
    rows = {"MHA": 2 * 32 * 128, "GQA": 2 * 8 * 128, "MLA": 512 + 64, "MQA": 2 * 128}
    label = {"MHA": "MHA, 32 KV heads", "GQA": "GQA, 8", "MQA": "MQA, 1", "MLA": "MLA, 512 + 64"}
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for name, elements in rows.items():
        a_token = 32 * elements * 2
        full = room / a_token
        most = min(full, 140_000)
        end = most, 1e3 * (weights + most * a_token) / bandwidth
        axes.plot([0, end[0]], [1e3 * weights / bandwidth, end[1]], color=VARIANTS[name], linewidth=2)
        text = f"{label[name]}: {a_token:,} bytes a token"
        if full == most:
            axes.plot(*end, "o", color=VARIANTS[name])
            text += f", memory full at {full:,.0f}"
        shift = (-8, 14) if name == "MHA" else (8, 0)
        axes.annotate(text, end, shift, textcoords="offset points", va="center", color=VARIANTS[name])
    axes.set(xlim=(0, 200_000), ylim=(0, 88), xlabel="tokens in the cache, of all sequences", ylabel="ms a step")
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    figure.tight_layout()
    return figure


PICTURES = {"cache": cache, "roofline": roofline, "mqa": mqa, "gqa": gqa}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        draw().savefig(Path(sys.argv[1]) / f"{name}.png", metadata={"Software": None})
