"""models/tiny-*.safetensors: four models that differ in their attention alone, and transformers (make_reference.py)."""

import json
import re
import shutil

import pytest
from checkpoints import REFERENCE
from conftest import ROOT, run_binary
from test_reference import run, tokens

TEXT = ROOT / "models/corpus-sample.txt"
VARIANTS = ("mha", "mqa", "gqa", "mla")
OF_ATTENTION = {"attention", "n_kv_heads", "head_dim", "attention_scale"}
OF_MLA = {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}


def weights(name):
    return ROOT / f"models/tiny-{name}.safetensors"


def config(name):
    with weights(name).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


@pytest.fixture(scope="module")
def reference():
    return json.loads((REFERENCE / "bundled.json").read_text())


def test_only_the_attention_differs():
    configs = [config(name) for name in VARIANTS]
    assert [c["attention"] for c in configs] == list(VARIANTS)
    shared = [{key: value for key, value in c.items() if key not in OF_ATTENTION | OF_MLA} for c in configs]
    assert all(c == shared[0] for c in shared)


def test_size():
    assert sum(weights(name).stat().st_size for name in VARIANTS) <= 16e6


@pytest.mark.parametrize("name", VARIANTS)
def test_text(name, reference, tmp_path):
    """24 greedy tokens on each of 12 prompts in one batch; and once alone, id by id. MLA in both its forms."""
    texts, binary = reference["models"][name]["texts"], run_binary(attention=name, kv="f32")
    requests = [{"prompt": text["prompt"], "n": len(text["greedy"]), "temperature": 0} for text in texts]
    (tmp_path / "requests").write_text("".join(json.dumps(request) + "\n" for request in requests))
    for flags in [["--mla", form] for form in ("absorbed", "expanded")] if name == "mla" else [[]]:
        answers = run(binary, weights(name), "--prompts", tmp_path / "requests", "--parallel", len(texts), *flags)
        for answer, text in zip(map(json.loads, answers.splitlines()), texts, strict=True):
            assert answer["text"] == text["text"]
    text = texts[0]
    assert tokens(binary, weights(name), text["prompt"], len(text["greedy"])) == (text["ids"], text["greedy"])


@pytest.mark.parametrize("name", VARIANTS)
def test_perplexity(name, reference):
    """Activations in bfloat16 have 8 bits: 1 %, as of the real models."""
    size = ["-c", reference["chunk"], "--chunks", reference["chunks"]]
    printed = run(run_binary(attention=name, kv="f32"), weights(name), "--perplexity", TEXT, *size)
    figure, expected = float(printed.split("perplexity ")[1].split()[0]), reference["models"][name]["perplexity"]
    assert abs(figure / expected - 1) <= 0.01, f"{figure} is not {expected}"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_readme_has_the_figures(name, tmp_path):
    """All but the speed, as lab/bundled.py measures them."""
    (row,) = re.findall(rf"^\| tiny-{name} \|.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    _, _, _, parameters, perplexity, kv, _, _ = (cell.strip().replace(",", "") for cell in row.split("|"))
    run(run_binary(attention=name), weights(name), "-i", "I", "-n", 1, "-q", "--stats", tmp_path / "report")
    report = json.loads((tmp_path / "report").read_text())
    assert (float(parameters), float(kv)) == (report["parameters"], report["kv_bytes_per_token"])
    printed = run(run_binary(attention=name), weights(name), "--perplexity", TEXT, "-c", 128, "-q")
    assert float(perplexity) == pytest.approx(float(printed.split("perplexity ")[1].split()[0]), rel=0.01)


def test_where_the_tokenizer_is(tmp_path):
    """Beside the model under its name; else the folder above's. One that is there and wrong is not passed over."""
    model, own, shared = (
        tmp_path / path for path in ("models/m.safetensors", "models/m.tokenizer.bin", "tokenizer.bin")
    )
    model.parent.mkdir()
    shutil.copy(weights("gqa"), model)
    (tmp_path / "link.safetensors").symlink_to(model)
    binary = run_binary(kv="f32")
    once = (binary, weights("gqa"), "-i", "Once", "-n", 5, "--temperature", 0)
    expected = run(*once)

    def complaint():
        with pytest.raises(AssertionError) as raised:
            run(binary, model, "-i", "Once", "-q")
        return str(raised.value)

    assert f"{own}: No such file" in complaint()
    shutil.copy(ROOT / "tokenizer.bin", shared)
    assert run(binary, model, *once[2:]) == run(binary, tmp_path / "link.safetensors", *once[2:]) == expected
    own.write_bytes(b"another")
    assert str(own) in complaint()
    own.unlink()
    shared.write_bytes(shared.read_bytes()[:-4])
    assert str(shared) in complaint()
