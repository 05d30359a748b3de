"""llama.cpp on one model file, timed by its own counters (llama_perf_context): prints JSON.

usage: llama_cpp_peer.py speed MODEL.gguf THREADS plain|flash f16|q8 LONG STATE   what lab/speed.py compares, once
       llama_cpp_peer.py resident MODEL.gguf THREADS PROMPT DECODE                the most memory it held
       llama_cpp_peer.py requests MODEL.gguf THREADS N PROMPT DECODE unified|apart   N sequences at once
       llama_cpp_peer.py perplexity MODEL.gguf THREADS TEXT CHUNKS                llama-perplexity's protocol, by 512
       llama_cpp_peer.py quantize MODEL.gguf OUT.gguf                             to Q8_0
"""

import ctypes
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np

PROMPT, DECODE, SHORT, CHUNK = 512, 128, 128, 512  # as `run --bench` and `run --perplexity`


class Peer:
    def __init__(
        self, path: str, threads: int, context: int, flash: bool, kv: str = "f16", sequences: int = 1, unified=False
    ):
        model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_seq_max = sequences
        params.kv_unified = unified  # one cache for all, everybody's keys behind a mask; or one for each sequence
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = {"f16": ll.GGML_TYPE_F16, "q8": ll.GGML_TYPE_Q8_0}[kv]
        params.no_perf = False
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama_init_from_model failed")
        self.vocab = ll.llama_model_get_vocab(model)
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocab)

    def decode(self, tokens: list[int]) -> None:
        """One step after what is in the cache, with the logits of its last token."""
        array = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(self.context, ll.llama_batch_get_one(array, len(tokens))) != 0:
            sys.exit("llama_decode failed")
        ll.llama_synchronize(self.context)

    def random(self, n: int) -> list[int]:
        return [random.randrange(self.n_vocab) for _ in range(n)]

    def clear(self) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(self.context), False)

    def counters(self) -> ll.llama_perf_context_data:
        """Since the last call."""
        data = ll.llama_perf_context(self.context)
        ll.llama_perf_context_reset(self.context)
        return data

    def tokenize(self, text: bytes) -> list[int]:
        tokens = (ll.llama_token * (len(text) + 2))()
        n = ll.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), True, False)
        return tokens[:n]


def speed(path: str, threads: str, attention: str, kv: str, long: str, state: str) -> dict:
    """STATE: where the cache of LONG tokens is kept from one process to the next."""
    context = int(long)
    peer = Peer(path, int(threads), context + DECODE, attention == "flash", kv)
    peer.decode(peer.tokenize(b"Once upon a time"))
    result = {"first token, s": peer.counters().t_load_ms / 1e3}  # from the start of the load to the first logits
    for _ in range(2):  # the first one warms up
        peer.clear()
        peer.decode(peer.random(PROMPT))
        data = peer.counters()
    result[f"prompt {PROMPT}, tokens/s"] = 1e3 * data.n_p_eval / data.t_p_eval_ms

    def decode(context: int) -> None:
        peer.counters()
        for _ in range(DECODE):
            peer.decode(peer.random(1))
        data = peer.counters()
        result[f"decode {DECODE} at {context}, tokens/s"] = 1e3 * data.n_eval / data.t_eval_ms

    peer.clear()
    peer.decode(peer.random(SHORT))
    decode(SHORT)
    peer.clear()
    if not os.path.exists(state):
        for _ in range(0, context, PROMPT):
            peer.decode(peer.random(PROMPT))
        if not ll.llama_state_save_file(peer.context, state.encode(), None, 0):
            sys.exit("llama_state_save_file failed")
    elif not ll.llama_state_load_file(peer.context, state.encode(), None, 0, ctypes.byref(ctypes.c_size_t())):
        sys.exit("llama_state_load_file failed")
    decode(context)
    return result


def peak_resident() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def resident(path: str, threads: str, n_prompt: str, n_decode: str) -> dict:
    before = peak_resident()  # Python's own
    peer = Peer(path, int(threads), int(n_prompt) + int(n_decode), flash=True)
    peer.decode(peer.random(int(n_prompt)))
    for _ in range(int(n_decode)):
        peer.decode(peer.random(1))
    return {"resident": peak_resident() - before}


def requests(path: str, threads: str, n: str, n_prompt: str, n_decode: str, kv: str) -> dict:
    """N prompts at once, then the likeliest token of each, again and again."""
    count, prompt, steps = int(n), int(n_prompt), int(n_decode)
    peer = Peer(path, int(threads), count * (prompt + steps), flash=True, sequences=count, unified=kv == "unified")
    batch = ll.llama_batch_init(max(PROMPT, count), 0, 1)

    def decode(tokens: list[tuple[int, int, int]]) -> list[int]:  # (sequence, position, token); the likeliest next
        chosen = []
        for start in range(0, len(tokens), PROMPT):
            part = tokens[start : start + PROMPT]
            batch.n_tokens = len(part)
            for i, (sequence, position, token) in enumerate(part):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = position >= prompt - 1
            if ll.llama_decode(peer.context, batch) != 0:
                sys.exit("llama_decode failed")
            rows = sum(position >= prompt - 1 for _, position, _ in part)
            logits = ll.llama_get_logits(peer.context)  # waits until they are there
            chosen += np.ctypeslib.as_array(logits, (rows, peer.n_vocab)).argmax(axis=1).tolist() if rows else []
        return chosen

    for times in (2, steps):  # the first one warms up
        peer.clear()
        prompts = [(s, p, token) for s in range(count) for p, token in enumerate(peer.random(prompt))]
        began = time.perf_counter()
        chosen = decode(prompts)
        prompted = time.perf_counter()
        for step in range(times - 1):
            chosen = decode([(s, prompt + step, token) for s, token in enumerate(chosen)])
        ended = time.perf_counter()
    return {
        "decode, tokens/s": count * (steps - 1) / (ended - prompted),
        "in all, generated tokens/s": count * steps / (ended - began),
    }


def perplexity(path: str, threads: str, text: str, chunks: str) -> dict:
    peer = Peer(path, int(threads), CHUNK, flash=False)
    with open(text, "rb") as file:
        tokens = peer.tokenize(file.read())
    batch = ll.llama_batch_init(CHUNK, 0, 1)
    batch.n_tokens = CHUNK
    losses = []
    for chunk in range(int(chunks)):
        part = tokens[chunk * CHUNK : (chunk + 1) * CHUNK]
        if ll.llama_vocab_get_add_bos(peer.vocab):
            part[0] = ll.llama_vocab_bos(peer.vocab)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= CHUNK // 2
        peer.clear()
        if ll.llama_decode(peer.context, batch) != 0:
            sys.exit("llama_decode failed")
        for i in range(CHUNK // 2, CHUNK - 1):
            row = np.ctypeslib.as_array(ll.llama_get_logits_ith(peer.context, i), (peer.n_vocab,)).astype(np.float64)
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[part[i + 1]])
    return {"perplexity": float(np.exp(np.mean(losses)))}


def quantize(path: str, out: str) -> dict:
    params = ll.llama_model_quantize_default_params()
    params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    if ll.llama_model_quantize(path.encode(), f"{out}.part".encode(), ctypes.byref(params)) != 0:
        sys.exit("llama_model_quantize failed")
    os.replace(f"{out}.part", out)
    return {"written": out}


if __name__ == "__main__":
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    commands = {f.__name__: f for f in (speed, resident, requests, perplexity, quantize)}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
