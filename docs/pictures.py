"""Draws the chapters' diagrams and plots: pictures.py FOLDER. The figures in them are computed here from the shapes, by
the formulas of the chapters."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

QUERY, KEY, VALUE, LATENT, EMPTY = "#4c78a8", "#e45756", "#f2a33a", "#72a98f", "#ececec"
SCORE, DONE = "#8e6bb0", "#d3c6e0"
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


def mla():
    """Widths of DeepSeek V2 and V3: 128 heads, a latent of 512, a rotated key of 64."""
    figure, (expanded, absorbed) = canvas(26, 10.4, 2)

    def row(area, y):
        box(area, 0.6, y, 8, 1, "latent c: 512", LATENT)
        box(area, 8.6, y, 2, 1, "k: 64", KEY)
        area.text(10.8, y + 0.5, "the row\nthat is kept", va="center", size=10)

    def step(area, start, end, label="", at=(0, 0), **style):
        arrow(area, start, end, **style)
        area.text(*at, label, va="center", size=10)

    expanded.text(6.5, 9.8, "expanded: prompts", ha="center", size=13)
    row(expanded, 0.4)
    box(expanded, 0.6, 7.4, 2.6, 1, "q: 128", QUERY)
    box(expanded, 3.2, 7.4, 1.4, 1, "64", QUERY)
    box(expanded, 0.6, 4.4, 2.6, 1, "K: 128", KEY)
    box(expanded, 3.2, 4.4, 1.4, 1, "64", KEY)
    box(expanded, 6, 4.4, 2.6, 1, "V: 128", VALUE)
    box(expanded, 6, 7.4, 2.6, 1, "out: 128", QUERY)
    expanded.text(9, 6.4, "of each of\n128 heads", va="center", size=10)
    step(expanded, (2.6, 7.3), (2.6, 5.5), "score", (2.8, 6.4), arrowstyle="<->")
    step(expanded, (7.3, 5.5), (7.3, 7.3), "weighted", (5.2, 6.4))
    step(expanded, (1.9, 1.5), (1.9, 4.3), "W_UK", (0.5, 2.9))
    step(expanded, (7.3, 1.5), (7.3, 4.3), "W_UV", (7.5, 3.6))
    step(expanded, (9.4, 1.5), (4.1, 4.3), "the same\nfor all heads", (3.2, 2.6))

    absorbed.text(6.5, 9.8, "absorbed: decode", ha="center", size=13)
    box(absorbed, 0.6, 8.2, 2.6, 1, "q: 128", QUERY)
    box(absorbed, 3.2, 8.2, 1.4, 1, "64", QUERY)
    box(absorbed, 0.6, 6.2, 8, 1, "q in the latent space: 512", QUERY)
    box(absorbed, 8.6, 6.2, 2, 1, "64", QUERY)
    row(absorbed, 4.2)
    box(absorbed, 0.6, 2.2, 8, 1, "weighted sum of latents: 512", VALUE)
    box(absorbed, 0.6, 0.2, 2.6, 1, "out: 128", QUERY)
    absorbed.text(10.8, 6.7, "of each of\n128 heads", va="center", size=10)
    absorbed.text(10.8, 2.7, "of each of\n128 heads", va="center", size=10)
    step(absorbed, (2.3, 8.1), (2.3, 7.3), "W_UK^T", (0.4, 7.7))
    step(absorbed, (4.2, 8.1), (9.4, 7.3))
    step(absorbed, (4.6, 6.1), (4.6, 5.3), "score: 512 + 64 wide", (4.9, 5.7), arrowstyle="<->")
    step(absorbed, (4.6, 4.1), (4.6, 3.3), "its first 512 are the value", (4.9, 3.7))
    step(absorbed, (1.9, 2.1), (1.9, 1.3), "W_UV", (2.1, 1.7))
    return figure


def paged():
    """Two requests with a common prompt of 8 tokens, blocks of 4."""
    figure, (slots, blocks) = canvas(30, 11, 2)
    slots.text(7, 10.3, "a slot of the longest context each", ha="center", size=13)
    for y, used, name in ((7.6, 11, "A"), (5.4, 9, "B"), (3.2, 4, "C")):
        slots.text(0.2, y + 0.4, name, va="center", size=12)
        for i in range(16):
            box(
                slots,
                1 + i * 0.8,
                y,
                0.8,
                0.8,
                color=(LATENT if i < 8 and name != "C" else QUERY) if i < used else EMPTY,
            )
    slots.text(1, 1.8, "24 of 48 places hold a token", size=11)

    blocks.text(7, 10.3, "blocks of 4 tokens from one pool", ha="center", size=13)
    tables = {"A": [2, 5, 0], "B": [2, 5, 3], "C": [6]}
    for (name, table), y in zip(tables.items(), (8.6, 7.2, 5.8), strict=True):
        blocks.text(0.2, y + 0.4, name, va="center", size=12)
        for i, block in enumerate(table):
            box(blocks, 1 + i * 1.1, y, 1.1, 0.8, str(block), "white", 10)
            blocks.add_patch(Rectangle((1 + i * 1.1, y), 1.1, 0.8, fill=False, edgecolor="#888888"))
    blocks.text(4.8, 9, "block_table: which blocks are its own,\nin the order of the tokens", va="center", size=10)
    used = {2: (LATENT, 4), 5: (LATENT, 4), 0: (QUERY, 3), 3: (QUERY, 1), 6: (QUERY, 4)}
    for block in range(8):
        x, y = 0.6 + block % 4 * 3.5, 3 - block // 4 * 1.9
        blocks.text(x, y + 0.95, str(block), size=10)
        color, n = used.get(block, (EMPTY, 0))
        for i in range(4):
            box(blocks, x + i * 0.8, y, 0.8, 0.8, color=color if i < n else EMPTY)
    blocks.text(0.6, 0.2, "16 of 20 places hold a token, 3 blocks are free", size=11)
    blocks.text(8.2, 6.3, "2 and 5: the prompt that\nA and B share", va="center", size=10, color="#4d7c6c")
    return figure


def flash():
    """A prompt of 12 tokens, query tiles of 4 rows, tiles of 4 tokens."""
    figure, (naive, tiled) = canvas(30, 14.6, 2)
    titles = {
        naive: ("naive: all scores, their softmax, then the sums", "[n, n] of every head goes to memory and back"),
        tiled: ("flash: a tile of scores at a time", "of the tiles that are done: max, sum and out [4, d]"),
    }
    for area, (title, below) in titles.items():
        area.text(7.5, 13.9, title, ha="center", size=13)
        area.text(7.5, 0.5, below, ha="center", size=11)
        area.text(1.9, 12.3, "Q", ha="center", size=11)
        area.text(7.8, 12.3, "K and V of tokens 0 .. 11", ha="center", size=11)
        for i in range(12):
            row, at_work = 10.2 - 0.8 * i, area is naive or 4 <= i < 8
            box(area, 1.5, row, 0.8, 0.8, color=QUERY if at_work else "#c3d2e3")
            box(area, 3 + 0.8 * i, 11.3, 0.8, 0.8, color=KEY if at_work else "#f3c3c4")
            for j in range(i + 1):
                color = EMPTY if not at_work else SCORE if area is naive or j >= 4 else DONE
                box(area, 3 + 0.8 * j, row, 0.8, 0.8, color=color)
        area.add_patch(Rectangle((3, 1.4), 9.6, 9.6, fill=False, edgecolor="#999999", linewidth=0.8))
    tiled.add_patch(Rectangle((6.2, 4.6), 3.2, 3.2, fill=False, edgecolor="black", linewidth=2))
    tiled.text(9.7, 7, "scores\nat work", va="center", size=10)
    return figure


PICTURES = {f.__name__: f for f in (cache, roofline, mqa, gqa, mla, paged, flash)}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        draw().savefig(Path(sys.argv[1]) / f"{name}.png", metadata={"Software": None})
