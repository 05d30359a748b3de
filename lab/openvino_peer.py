"""OpenVINO GenAI on one GGUF file, timed by its own counters: prints JSON, what lab/speed.py compares, once.

usage: openvino_peer.py MODEL.gguf THREADS LONG

It reads the Llama and Qwen architectures; of another there are no figures, and a line says why.
"""

import json
import sys

import numpy as np
import openvino  # its library must be there before the next line's
import openvino_genai

PROMPT, DECODE, SHORT = 512, 128, 128  # as `run --bench`


class Peer:
    def __init__(self, path: str, threads: int):
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
        self.n_vocab = len(self.pipeline.get_tokenizer().get_vocab())

    def generate(self, prompt: int, n: int) -> openvino_genai.PerfMetrics:
        """n tokens, always the likeliest, after a prompt of random ones."""
        ids = np.random.default_rng().integers(0, self.n_vocab, (1, prompt))
        config = openvino_genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return self.pipeline.generate(inputs, config).perf_metrics


def speed(path: str, threads: str, long: str) -> dict:
    try:
        peer = Peer(path, int(threads))
    except RuntimeError as error:
        print(f"OpenVINO takes no {path}: {str(error).splitlines()[-1]}", file=sys.stderr)
        return {}
    for _ in range(2):  # the first one warms up
        metrics = peer.generate(PROMPT, 1)
    result = {f"prompt {PROMPT}, tokens/s": 1e3 * PROMPT / metrics.get_ttft().mean}
    for context in (SHORT, int(long)):
        metrics = peer.generate(context, DECODE + 1)
        result[f"decode {DECODE} at {context}, tokens/s"] = 1e3 / metrics.get_tpot().mean
    return result


if __name__ == "__main__":
    print(json.dumps(speed(*sys.argv[1:])))
