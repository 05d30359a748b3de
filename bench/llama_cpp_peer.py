"""llama.cpp on one model file, timed by its own counters (llama_perf_context): prints JSON.

usage: llama_cpp_peer.py speed MODEL.gguf THREADS CONTEXT flash|plain f16|q8     tokens a second, as bench.py's `ours`
       llama_cpp_peer.py perplexity MODEL.gguf THREADS TEXT CHUNKS       llama-perplexity's protocol, chunks of 512
       llama_cpp_peer.py quantize MODEL.gguf OUT.gguf                    to Q8_0
"""

import ctypes
import json
import sys

import llama_cpp.llama_cpp as ll
import numpy as np

PROMPT, DECODE, CHUNK = 512, 128, 512
DECODE_FAR = 32  # tokens decoded at the long context
KV_TYPES = {"f16": 1, "q8": 8}  # of ggml_type


class Peer:
    def __init__(self, path: str, threads: int, context: int, flash: bool, kv: str = "f16"):
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = KV_TYPES[kv]
        params.no_perf = False
        self.context = ll.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp refuses this context: flash={flash}, kv={kv}")
        self.vocab = ll.llama_model_get_vocab(self.model)

    def decode(self, tokens: list[int]) -> None:
        """One batch after what is in the cache; the logits of its last token."""
        array = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(self.context, ll.llama_batch_get_one(array, len(tokens))) != 0:
            sys.exit("llama_decode failed")
        ll.llama_synchronize(self.context)

    def fill(self, n: int) -> None:
        for _ in range(n // PROMPT):
            self.decode([1000] * PROMPT)

    def clear(self) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(self.context), False)
        ll.llama_perf_context_reset(self.context)

    def perf(self) -> ll.llama_perf_context_data:
        return ll.llama_perf_context(self.context)

    def tokenize(self, text: bytes) -> list[int]:
        tokens = (ll.llama_token * (len(text) + 2))()
        n = ll.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), True, False)
        return list(tokens[:n])


def speed(path: str, threads: str, context: str, flash: str, kv: str) -> dict:
    peer = Peer(path, int(threads), int(context) + PROMPT, flash == "flash", kv)
    peer.decode(peer.tokenize(b"Once upon a time"))
    first_token_s = peer.perf().t_load_ms / 1e3  # from the start of the load to the first logits
    peer.clear()
    peer.fill(PROMPT)
    prompt = peer.perf()
    peer.clear()
    for _ in range(DECODE):
        peer.decode([1000])
    near = peer.perf()
    peer.clear()
    peer.fill(int(context))
    ll.llama_perf_context_reset(peer.context)
    for _ in range(DECODE_FAR):
        peer.decode([1000])
    far = peer.perf()
    return {
        "prompt": 1e3 * prompt.n_p_eval / prompt.t_p_eval_ms,
        "decode": 1e3 * near.n_eval / near.t_eval_ms,
        "decode_far": 1e3 * far.n_eval / far.t_eval_ms,
        "first_token_s": first_token_s,
    }


def perplexity(path: str, threads: str, text: str, chunks: str) -> dict:
    peer = Peer(path, int(threads), CHUNK, flash=False)
    n_vocab = ll.llama_vocab_n_tokens(peer.vocab)
    with open(text, "rb") as file:
        tokens = peer.tokenize(file.read())
    batch = ll.llama_batch_init(CHUNK, 0, 1)
    losses = []
    for chunk in range(int(chunks)):
        part = tokens[chunk * CHUNK : (chunk + 1) * CHUNK]
        if ll.llama_vocab_get_add_bos(peer.vocab):
            part[0] = ll.llama_vocab_bos(peer.vocab)
        batch.n_tokens = CHUNK
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= CHUNK // 2
        peer.clear()
        if ll.llama_decode(peer.context, batch) != 0:
            sys.exit("llama_decode failed")
        for i in range(CHUNK // 2, CHUNK - 1):
            row = np.ctypeslib.as_array(ll.llama_get_logits_ith(peer.context, i), (n_vocab,)).astype(np.float64)
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[part[i + 1]])
    return {"perplexity": float(np.exp(np.mean(losses)))}


def quantize(path: str, out: str) -> dict:
    params = ll.llama_model_quantize_default_params()
    params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    if ll.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params)) != 0:
        sys.exit("llama_model_quantize failed")
    return {"written": out}


if __name__ == "__main__":
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    print(json.dumps({"speed": speed, "perplexity": perplexity, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])))
