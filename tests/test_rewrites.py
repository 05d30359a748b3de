"""The same model in three attention layouts writes the same text, with other KV bytes."""

import json

import pytest
from conftest import exported, exported_path, run_binary
from test_reference import ROOT, SANITIZE, checkpoints, run, variant


@pytest.mark.parametrize("layout", ["mha", "gqa:9", "mla"])
def test_real_texts_of_a_rewrite(layout, tmp_path):
    """64 greedy tokens on 12 prompts, as transformers writes them; K and V in float32, both forms of MLA."""
    reference = json.loads((checkpoints.REFERENCE / "real_smollm2.json").read_text())
    source = ROOT / "models" / reference["file"]
    if SANITIZE == "1" or not source.exists():
        pytest.skip(
            f"models/{source.name} is not here (`make smollm2` downloads it), or the build is the sanitized one"
        )
    weights = exported_path(f"rewrite-{layout.replace(':', '-')}")
    kind = (layout.split(":")[0], int(layout.split(":")[1]) if ":" in layout else 0)
    exported(source, weights, "f32", kind)
    binary = run_binary(attention=variant(weights), kv="f32")
    requests = tmp_path / "requests"
    requests.write_text(
        "".join(
            json.dumps({"prompt": t["prompt"], "n": len(t["greedy"]), "temperature": 0}) + "\n"
            for t in reference["texts"]
        )
    )
    bytes_per_token = {"mha": 2 * 9 * 64 * 4 * 30, "gqa": 2 * 9 * 64 * 4 * 30, "mla": 2 * 3 * 64 * 4 * 30}
    for form in ("absorbed", "expanded") if variant(weights) == "mla" else (None,):
        flags = ["--mla", form] if form else []
        stats = tmp_path / "stats"
        answers = run(binary, weights, "--prompts", requests, "--parallel", 12, "--stats", stats, *flags).splitlines()
        for answer, text in zip(map(json.loads, answers), reference["texts"], strict=True):
            assert answer["text"].rstrip("\ufffd") == text["text"].rstrip("\ufffd")
        assert json.loads(stats.read_text())["kv_bytes_per_token"] == bytes_per_token[layout.split(":")[0]]
    weights.unlink()
