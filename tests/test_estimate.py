"""./run --estimate, from a config.json to the table: against published figures and closed formulas, and all that is
refused.

tests/data/configs/ holds the config.json of public models, as Hugging Face has them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, exported, make, run_binary

import export as program

CONFIGS = Path(__file__).resolve().parent / "data" / "configs"
GPUS = {"a10": (600e9, 125e12), "h100-sxm": (3.35e12, 989.4e12)}  # bytes/s, bfloat16 FLOP/s: datasheets


def shapes(config, folder, type=None):
    return exported(Path(config), folder / (Path(config).stem + f"{type or ''}.safetensors"), type)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    known = {}

    def get(name):
        if name not in known:
            known[name] = shapes(CONFIGS / f"{name}.json", folder)
        return known[name]

    return get


def run(*arguments, code=0, build=None):
    done = subprocess.run(
        [str(a) for a in (run_binary(**build or {}), *arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stderr}"
    return done


def estimate(model, *arguments, build=None):
    """The JSON, and its own variant."""
    report = json.loads(run(model, "--estimate", *arguments, "-q", "--stats", "-", build=build).stdout)
    (own,) = (variant for variant in report["variants"] if variant["own"])
    return report, own


@pytest.mark.parametrize(
    ("name", "billions", "kv"),
    [  # of the models' cards and papers; KV bytes a token in 16 bits
        ("smollm2-135m", 0.1345, 2 * 30 * 3 * 64 * 2),
        ("llama-2-7b", 6.738, 2 * 32 * 32 * 128 * 2),
        ("llama-3-8b", 8.030, 131072),
        ("llama-3-70b", 70.554, 327680),
        ("deepseek-v2-lite", 15.706, 27 * (512 + 64) * 2),
        ("deepseek-v2", 235.7, 69120),
        ("deepseek-v3", 671.0, 70272),
        ("gpt-oss-20b", 20.91, 2 * 24 * 8 * 64 * 2),
    ],
)
def test_sizes_of_public_models(plan, name, billions, kv):
    _, own = estimate(plan(name), "--gpu", "b200")
    assert own["parameters"] / 1e9 == pytest.approx(billions, rel=3e-4)  # as rounded there
    assert own["kv_bytes_per_token"] == kv


@pytest.mark.parametrize(
    ("gpu", "sequences", "context"), [("a10", 1, 4096), ("h100-sxm", 1, 512), ("h100-sxm", 64, 2048)]
)
def test_a_dense_model_by_the_closed_formulas(plan, gpu, sequences, context):
    """Llama 3 8B: W / BW against 2 P B / F, B T kv / BW against its FLOP, and n (2 P / F) + the causal half's."""
    bandwidth, flops = GPUS[gpu]
    layers, dim, hidden, heads, width, vocab = 32, 4096, 14336, 32, 128, 128256
    matrices = layers * (2 * dim * dim + 2 * dim * 8 * width + 3 * dim * hidden)
    read = matrices + vocab * dim  # the classifier; of the embedding a row
    report, own = estimate(plan("llama-3-8b"), "--gpu", gpu, "-c", context, "--parallel", sequences, "-b", context)
    weights, products = 2 * read / bandwidth, 2 * read * sequences / flops
    kv, attention = sequences * context * 131072 / bandwidth, sequences * 4 * heads * width * context * layers / flops
    assert own["weight_bytes_per_step"] == pytest.approx(2 * read, rel=2e-4)  # norms come on top
    assert own["seconds_of_weights"] == pytest.approx(weights, rel=2e-4)
    assert own["seconds_of_products"] == pytest.approx(products, rel=1e-6)
    assert own["seconds_of_kv"] == pytest.approx(kv, rel=1e-6)
    assert own["seconds_of_attention"] == pytest.approx(attention, rel=1e-6)
    total = max(weights, products) + max(kv, attention) + own["seconds_of_launches"]
    assert own["seconds_per_step"] == pytest.approx(total, rel=2e-4)
    assert own["bound_by"] == ("KV" if kv > weights else "weights")
    prompt = context * 2 * matrices / flops + 2 * vocab * dim / flops  # in one step
    prompt = max(prompt, weights) + max(
        layers * heads * 2 * width * context * (context + 1) / flops, context * 131072 / bandwidth
    )
    assert own["prompt_seconds"] == pytest.approx(prompt + own["seconds_of_launches"], rel=2e-4)
    assert own["ridge_batch"] == pytest.approx(flops / bandwidth, abs=1.01)
    assert report["machine"].lower().replace(" ", "-") == gpu


def test_an_expert_model_reads_the_experts_that_a_batch_hits(plan):
    """DeepSeek V3 activates 37 billion parameters a token; 256 (1 - (1 - 8/256)^64) experts are hit by 64 tokens."""
    embedding, expert, layers = 129280 * 7168, 3 * 7168 * 2048, 58
    one, many = (estimate(plan("deepseek-v3"), "--gpu", "h200", "--parallel", n)[1] for n in (1, 64))
    assert one["weight_bytes_per_step"] / 2 == pytest.approx(37e9, rel=0.02)
    more = layers * expert * (256 * (1 - (1 - 8 / 256) ** 64) - 8)
    assert many["weight_bytes_per_step"] - one["weight_bytes_per_step"] == pytest.approx(2 * more, rel=1e-3)
    assert one["weight_bytes"] / 2 == pytest.approx(671.026e9 + 61 * 128 * 128 * 512, rel=1e-3)  # W_UK both ways
    assert embedding < one["parameters"]


def test_latent_attention_without_a_latent_of_the_queries(plan, tmp_path):
    """As in DeepSeek V2 Lite: q_lora_rank null is one matrix instead of two and a norm."""
    config = json.loads((CONFIGS / "deepseek-v2.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"q_lora_rank": None}))
    lite, whole = (
        estimate(path, "--gpu", "b200")[1] for path in (shapes(tmp_path / "config.json", tmp_path), plan("deepseek-v2"))
    )
    rank, dim, queries, layers = 1536, 5120, 128 * (128 + 64), 60
    assert lite["parameters"] - whole["parameters"] == layers * (queries * dim - rank * (dim + 1 + queries))


def test_windows_hide_tokens(plan):
    """gpt-oss: every second layer sees 128 tokens."""
    _, own = estimate(plan("gpt-oss-20b"), "--gpu", "h200", "-c", 100000)
    assert own["kv_bytes_per_step"] == own["kv_bytes_per_token"] / 2 * (100000 + 128)


def test_what_fits(plan):
    """Activations aside: (memory - weights) / (KV a token x tokens), whole sequences."""
    _, own = estimate(plan("llama-3-8b"), "--gpu", "a100-80gb", "-c", 8192)
    most = (80e9 - 16.06e9) / (8192 * 131072)
    assert 0.9 * most < own["largest_batch"] <= most
    assert own["longest_context"] == 8192 and own["fits"]
    _, own = estimate(plan("llama-3-8b"), "--bandwidth", 100, "--flops", 10, "--memory", 16.6)
    assert 0 < own["longest_context"] <= (16.6e9 - 16.06e9) / 131072
    _, own = estimate(plan("llama-3-70b"), "--gpu", "h100-pcie")
    assert (own["largest_batch"], own["longest_context"], own["fits"]) == (0, 0, False)
    assert "does not fit: 142." in run(plan("llama-3-70b"), "--estimate", "--gpu", "h100-pcie").stdout


def test_types_to_plan_with(plan, tmp_path):
    bf16, q8 = (estimate(plan("llama-3-8b"), "--gpu", "l4", *flags)[1] for flags in ((), ("--type", "q8_0")))
    assert q8["weight_bytes"] / bf16["weight_bytes"] == pytest.approx(34 / 64, rel=1e-3)  # 32 bytes and a float16
    other = shapes(CONFIGS / "llama-3-8b.json", tmp_path, "q8_0")
    assert estimate(other, "--gpu", "l4")[1] == q8
    kv = estimate(plan("llama-3-8b"), "--gpu", "l4", "--kv-type", "q8")[1]["kv_bytes_per_token"]
    assert kv == 131072 / 2 * 34 / 32
    kv = estimate(plan("llama-3-8b"), "--gpu", "l4", "--kv-type", "q4")[1]["kv_bytes_per_token"]
    assert kv == 131072 / 2 * 20 / 32


def test_the_table_says_what_the_json_says(plan):
    done = run(plan("llama-3-70b"), "--estimate", "--gpu", "h200", "-c", 8192, "--parallel", 4)
    report, own = estimate(plan("llama-3-70b"), "--gpu", "h200", "-c", 8192, "--parallel", 4)
    lines = {line[:34].strip(): line[34:].split() for line in done.stdout.splitlines()}
    assert [v["attention"] for v in report["variants"]] == ["mha", "gqa", "mqa", "mla"]
    assert lines["KV a token, bytes"] == [f"{v['kv_bytes_per_token']:.0f}" for v in report["variants"]]
    assert lines["time of a step, ms"] == [f"{1e3 * v['seconds_per_step']:.3f}" for v in report["variants"]]
    assert lines["tokens/s in all"] == [f"{4 / v['seconds_per_step']:.1f}" for v in report["variants"]]
    assert own["kv_bytes_per_token"] == 327680


def test_a_model_cut_over_ranks(plan):
    """Llama 3 8B, in closed formulas: a layer gathers 3 x 4096 and 14336 floats, a step 4096 and 128256 more."""
    machine = ("--bandwidth", 50, "--flops", 1e6, "--memory", 64, "-c", 1000, "--kv-type", "f16", "--type", "q8_0")
    report, own = estimate(plan("llama-3-8b"), *machine, "--ranks", 5, "--link", "2,30")
    times = {r["ranks"]: r for r in report["ranks"]}
    assert list(times) == [1, 2, 3, 4, 5] and times[1]["seconds_of_gathering"] == 0
    assert times[1]["seconds_per_step"] == pytest.approx(own["seconds_per_step"])
    for n, heads in ((2, 4), (3, 3), (5, 2)):  # of 8 KV heads, where most are
        floats = 32 * (3 * 4096 + 14336) + 4096 + 128256
        gathering = (32 * 4 + 2) * 30e-6 + 4 * floats * (n - 1) / n / 2e9
        assert times[n]["seconds_of_gathering"] == pytest.approx(gathering, rel=1e-9)
        assert times[n]["kv_bytes_per_token"] == 131072 * heads / 8
        weights = own["weight_bytes_per_step"] / n  # norms are kept by all
        step = weights / 50e9 + 1000 * times[n]["kv_bytes_per_token"] / 50e9 + gathering
        assert times[n]["seconds_per_step"] == pytest.approx(step + own["seconds_of_launches"], rel=2e-3)


def test_what_a_second_rank_pays(plan):
    ranks = ("--estimate", "--gpu", "h100-sxm", "--ranks", 4, "--link")
    table = [run(plan("llama-3-8b"), *ranks, link).stdout for link in ("400,2", "0.1,500")]
    assert "4 ranks are the fastest of these" in table[0] and "hidden            32 x      57344 bytes" in table[0]
    assert "a second rank does not pay" in table[1]


@pytest.mark.parametrize("build", [{}, {"cache": "paged"}, {"kernel": "naive"}], ids=str)
def test_this_machine_is_probed(plan, build):
    """The attention of this build for each variant: of 32 heads, a layer's pairs of 128 + 128, or 576 + 512."""
    report, own = estimate(plan("llama-3-8b"), "--threads", 1, "-c", 4096, build=build)
    assert report["machine"] == "this machine"
    assert 1e8 < report["bytes_per_second"] < 1e13 and 1e8 < report["flop_per_second"] < 1e15
    assert own["seconds_of_weights"] == pytest.approx(own["weight_bytes_per_step"] / report["bytes_per_second"])
    for variant in report["variants"]:
        width = 2 * 512 + 64 if variant["attention"] == "mla" else 2 * 128
        flop = 2 * 32 * 32 * 4096 * width
        assert 1e7 < flop / variant["seconds_of_attention"] < 1e13, variant["attention"]
        assert variant["prompt_seconds"] > 1e-13 * 4096 * 2 * own["parameters"] * 0.8


def test_gpu_list_needs_no_model():
    lines = run("--gpu", "list").stdout.splitlines()
    assert any(line.startswith("H100 SXM") and "3350" in line and "989" in line for line in lines)


def test_make_estimate():
    out = make("estimate", f"MODEL={CONFIGS / 'llama-3-70b.json'}", "GPU=h100-sxm", "ARGS=-c 8192")
    assert "H100 SXM" in out and "327680" in out
    again = make("estimate", f"MODEL={CONFIGS / 'llama-3-70b.json'}", "GPU=h100-sxm", "ARGS=-c 8192")
    assert again == out
    assert make("binary", "GPU=h100-sxm") == make("binary")  # it names no binary


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (["--gpu", "h101"], 2, "H100 PCIe"),
        (["--gpu", "H100"], 2, "H100 SXM"),
        (["--gpu", ""], 2, "--gpu"),
        (["--gpu", "l4", "--bandwidth", "3"], 2, "makes no sense"),
        (["--bandwidth", "100"], 2, "--flops"),
        (["--bandwidth", "100", "--flops", "1"], 2, "--memory"),
        (["--bandwidth", "0", "--flops", "1", "--memory", "1"], 2, "--bandwidth"),
        (["--bandwidth", "-1", "--flops", "1", "--memory", "1"], 2, "--bandwidth"),
        (["--bandwidth", "nan", "--flops", "1", "--memory", "1"], 2, "--bandwidth"),
        (["--bandwidth", "inf", "--flops", "1", "--memory", "1"], 2, "--bandwidth"),
        (["--gpu", "l4", "--parallel", "0"], 2, "--parallel 0"),
        (["--gpu", "l4", "-c", "-1"], 2, "-1"),
        (["--gpu", "l4", "-c", "9000"], 1, "8192"),
        (["--gpu", "l4", "--type", "q9"], 2, "q8_0"),
        (["--gpu", "l4", "--kv-type", "f8"], 2, "f16"),
        (["--gpu", "l4", "--bench"], 2, "makes no sense"),
        (["--gpu", "l4", "-i", "text"], 2, "makes no sense"),
        (["--gpu", "l4", "--temperature", "0"], 2, "--temperature makes no sense"),
        (["--gpu", "l4", "-q"], 2, "--stats"),
        (["--gpu", "l4", "--ranks", "2"], 2, "--ranks needs --link"),
        (["--gpu", "l4", "--link", "1,1"], 2, "--link needs --ranks"),
        (["--gpu", "l4", "--ranks", "0", "--link", "1,1"], 2, "--ranks 0"),
        *[
            (["--gpu", "l4", "--ranks", "2", "--link", bad], 2, "--link")
            for bad in ("1", "0,1", "1,-1", "nan,1", "1,1x")
        ],
        (["--gpu", "l4", "--stats", "/nowhere/at/all.json"], 1, "/nowhere/at/all.json"),
    ],
)
def test_wrong_input(plan, arguments, code, names):
    done = run(plan("llama-3-8b"), "--estimate", *arguments, code=code)
    assert done.stderr.count("\n") == 1 and names in done.stderr, done.stderr


def test_flags_that_need_estimate(plan):
    for flag in (["--gpu", "l4"], ["--type", "q8"], ["--kv-type", "q8"], ["--memory", "1"]):
        assert "needs --estimate" in run(plan("llama-3-8b"), *flag, code=2).stderr.replace("--bandwidth", "--estimate")


def test_shapes_do_not_run(plan):
    done = run(plan("llama-3-8b"), "-i", "x", code=1)
    assert done.stderr.count("\n") == 1 and "shapes without weights" in done.stderr


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"model_type": "unknown"}, "model_type"),
        ({"torch_dtype": "int3"}, "torch_dtype"),
        ({"novel_key": 1}, "novel_key"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_wrong_configs(tmp_path, change, names):
    config = json.loads((CONFIGS / "llama-3-8b.json").read_text()) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    command = [sys.executable, str(ROOT / "export.py"), str(path), "-o", str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and names in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.iterdir())])
def test_a_config_that_lacks_a_field_is_refused_by_its_name(name, tmp_path, capsys):
    """Or is planned with, where the field has a default."""
    config, refused = json.loads((CONFIGS / f"{name}.json").read_text()), 0
    for key in config:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        if program.main([str(tmp_path / "config.json"), "-o", str(tmp_path / "x.safetensors")]) == 0:
            (tmp_path / "x.safetensors").unlink()
            continue
        line, refused = capsys.readouterr().err, refused + 1
        assert line.count("\n") == 1 and key in line, line
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert refused >= 5


def test_a_report_adds_up():
    """A step is the longer of reading and multiplying, each of the weights and of the cache, and what comes on top."""
    done = run(ROOT / "models/tiny-gqa.safetensors", "-i", "Once upon a time", "-n", 40, "--ignore-eos")
    line = next(line for line in done.stderr.splitlines() if line.startswith("predict"))
    number = r"([\d.]+)"
    found = re.fullmatch(
        rf"predict  {number} tokens/s, bound by (\w+): weights {number} ms, KV {number}, compute {number}, "
        rf"launches {number}, logits {number}; the median step: \d+ % of it; "
        rf"probed now: {number} GB/s of these weights",
        line,
    )
    speed, bound, *parts, _ = found.groups()
    weights, kv, compute, launches, logits = map(float, parts)
    assert bound in ("weights", "KV", "compute", "launches", "logits")
    on_top = launches + logits
    assert max(weights + kv, compute) + on_top - 0.01 <= 1e3 / float(speed) <= weights + kv + compute + on_top + 0.01
