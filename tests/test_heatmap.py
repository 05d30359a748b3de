"""--heatmap: the shades of the picture are the attention weights of a forward pass in numpy."""

import re
import subprocess

import checkpoints
import numpy as np
import pytest
from conftest import exported, run_binary
from numpy_model import NumpyModel, load
from PIL import Image

PROMPT = "I like to eat, and so I like to cook"
WHITE, DARKEST = 255, 8  # red, of the weights 0 and 1
# Half a shade of rounding, and float32's on the way: scores of size 10 move weights by about 1e-5.
TOLERANCE = 0.5 / (WHITE - DARKEST) + 1e-4
# Variants, layers with a window and without, a cap on scores, sinks.
MODELS = ["llama_mha", "llama_mqa", "llama_gqa", "deepseek_v2", "gemma3", "gemma2", "gpt_oss"]


class Watched(NumpyModel):
    """Keeps each layer's weights, [n_heads, T, T]."""

    def attend(self, layer, q, k, v):
        seen = [super(Watched, self).attend(layer, q, k, self.one_hot(at, k.shape)) for at in range(len(q))]
        self.seen[layer] = np.stack([x.reshape(len(q), q.shape[1]).T for x in seen], axis=-1)
        return super().attend(layer, q, k, v)

    @staticmethod
    def one_hot(at, shape):
        """V [T, G, 1] that is 1 at one token: the sum over it is that token's weight."""
        v = np.zeros((*shape[:2], 1))
        v[at] = 1
        return v


def tiny(name, folder):
    return exported(checkpoints.build(checkpoints.load(name), folder / name), folder / f"{name}.safetensors", "f32")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp("heatmap"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Reads the weights out of a picture of one head. Where the cells lie is found in the picture of a model without
    sinks, whose first token has the weight 1 on itself: it is the same for every picture of this prompt."""
    folder = tmp_path_factory.mktemp("place")
    draw(tiny("llama_gqa", folder), folder / "place.png", "--head", 0)
    red = np.asarray(Image.open(folder / "place.png"))[..., 0]
    rows, columns = np.nonzero(red[40:] == DARKEST)  # below the scale
    top, left = rows[0] + 40, columns[rows == rows[0]][0]
    at = np.arange(len(PROMPT)) * (np.nonzero(red[top, left:] != DARKEST)[0][0] + 1)

    def read(picture):
        return (WHITE - np.asarray(Image.open(picture))[np.ix_(top + at, left + at)][..., 0].astype(float)) / (
            WHITE - DARKEST
        )

    return read


def draw(weights, picture, *flags, **choices):
    attention = load(weights)[0]["attention"]
    command = [run_binary(attention, kv="f32", **choices), weights, "-i", PROMPT, "--heatmap", picture, "-q", *flags]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True)


def test_shades_are_the_weights(model, cells, tmp_path):
    witness = Watched(model)
    witness.seen = {}
    witness.logits(list(PROMPT.encode()))
    last = max(witness.seen)
    for layer, head in (0, 0), (last, 1), (last, len(witness.seen[last]) - 1):
        done = draw(model, tmp_path / "one.png", "--layer", layer, "--head", head)
        assert (done.returncode, done.stderr) == (0, "")
        np.testing.assert_allclose(cells(tmp_path / "one.png"), witness.seen[layer][head], atol=TOLERANCE)


@pytest.mark.parametrize("model", ["llama_gqa"], indirect=True)
@pytest.mark.parametrize("choices", [{"cache": "paged"}, {"kernel": "naive"}])
def test_any_cache_and_kernel_draws_the_same(model, choices, tmp_path):
    draw(model, tmp_path / "a.png")
    draw(model, tmp_path / "b.png", **choices)
    a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert a.shape == b.shape and np.abs(a - b).max() <= 1  # the kernels of the layers before round differently


@pytest.mark.parametrize("model", ["llama_gqa"], indirect=True)
@pytest.mark.parametrize(
    "flags, line",
    [
        (["--layer", 99], r"run: --layer 99: this model has layers 0 \.\. \d"),
        (["--head", 99], r"run: --head 99: this model has heads 0 \.\. \d"),
        (["-i", "x" * 65], "run: --heatmap: the prompt has 65 tokens, at most 64 can be drawn"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(model, flags, line, tmp_path):
    command = [run_binary(kv="f32"), model, "--heatmap", tmp_path / "x.png", *flags]
    done = subprocess.run([str(a) for a in command], input=PROMPT, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(line + "\n", done.stderr), done.stderr
    assert not list(tmp_path.glob("x.png*"))
