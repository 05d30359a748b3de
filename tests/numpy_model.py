"""A float64 forward pass over a model file, written from the papers' formulas: the witness of what export.py writes."""

import json
import math
import struct

import gguf
import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


def load(path):
    """(config, {tensor name: float64 array, dequantised}, metadata)."""
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    raw = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + length + begin : 8 + length + end], DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        raw[name] = values
    types = json.loads(metadata["types"])
    tensors = {}
    for name, values in raw.items():
        kind = types.get(name.removesuffix(".weight"))
        if kind:
            values = gguf.dequantize(values, gguf.GGMLQuantizationType[kind.upper()])
        tensors[name] = values.astype(np.float64)
    return json.loads(metadata["config"]), tensors, metadata


def softmax(x, sinks=None):
    """sinks: a score more in each row, without a share of its own."""
    if sinks is not None:
        sinks = np.broadcast_to(sinks, (*x.shape[:-1], 1))
        return softmax(np.concatenate([x, sinks], axis=-1))[..., :-1]
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cap(x, limit):
    return limit * np.tanh(x / limit) if limit else x


class NumpyModel:
    def __init__(self, path):
        self.c, self.t, self.metadata = load(path)

    def linear(self, name, x):
        y = x @ self.t[name + ".weight"].T
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def norm(self, name, x, eps="norm_eps"):
        if name + ".weight" not in self.t:
            return x
        if self.c["norm"] == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.c[eps]) * self.t[name + ".weight"]
        return x + self.t[name + ".bias"] if name + ".bias" in self.t else x

    def norm_runs(self, name, x):
        """x [T, width], normed in runs as long as the weight: each head, or the whole row."""
        if name + ".weight" not in self.t:
            return x
        return self.norm(name, x.reshape(len(x), -1, len(self.t[name + ".weight"]))).reshape(x.shape)

    def rotate(self, layer, x):
        """x [T, heads, width]: element i of the first half with i + n."""
        index = self.c["rope"][layer]
        if index < 0:
            return x
        long = "long_" if 0 < self.c["original_seq_len"] < len(x) else ""
        inv_freq = self.t[f"rope.{index}.{long}inv_freq"]
        n = len(inv_freq)
        angle = np.arange(len(x))[:, None, None] * inv_freq
        cos, sin = np.cos(angle) * self.c["rope_scale"][index], np.sin(angle) * self.c["rope_scale"][index]
        a, b = x[..., :n], x[..., n : 2 * n]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * n :]], axis=-1)

    def attend(self, layer, q, k, v):
        """q [T, H, dk], k [T, G, dk], v [T, G, dv] -> [T, H dv]."""
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = cap(np.einsum("thd,shd->hts", q, k) * self.c["attention_scale"], self.c["attention_softcap"])
        t, s = np.arange(len(q))[:, None], np.arange(len(q))
        window = self.c["window"][layer] or len(q)
        scores = np.where((s <= t) & (s > t - window), scores, -np.inf)
        sinks = self.t.get(f"layers.{layer}.sinks")
        share = softmax(scores, None if sinks is None else sinks[:, None, None])
        return np.einsum("hts,shd->thd", share, v).reshape(len(q), -1)

    def attention(self, layer, x):
        c, p, T = self.c, f"layers.{layer}.", len(x)
        heads = c["n_heads"]
        if c["attention"] != "mla":
            q, k = (
                self.norm_runs(p + f"{one}_norm", self.linear(p + f"{one}_proj", x)).reshape(T, -1, c["head_dim"])
                for one in "qk"
            )
            v = self.linear(p + "v_proj", x).reshape(T, c["n_kv_heads"], -1)
            return self.linear(p + "o_proj", self.attend(layer, self.rotate(layer, q), self.rotate(layer, k), v))
        if c["q_lora_rank"]:
            q = self.linear(
                p + "q_b_proj", self.norm(p + "q_a_norm", self.linear(p + "q_a_proj", x), "latent_norm_eps")
            )
        else:
            q = self.linear(p + "q_proj", x)
        q = q.reshape(T, heads, -1)
        nope, rank = c["qk_nope_head_dim"], c["kv_lora_rank"]
        q = np.concatenate([q[..., :nope], self.rotate(layer, q[..., nope:])], axis=-1)
        kv = self.linear(p + "kv_a_proj", x)
        latent = self.norm(p + "kv_a_norm", kv[:, :rank], "latent_norm_eps")
        k_rope = self.rotate(layer, kv[:, None, rank:])
        k_nope = np.einsum("tr,hnr->thn", latent, self.t[p + "w_uk.weight"])
        k = np.concatenate([k_nope, np.broadcast_to(k_rope, (T, heads, k_rope.shape[-1]))], axis=-1)
        v = np.einsum("tr,hvr->thv", latent, self.t[p + "w_uv.weight"])
        return self.linear(p + "o_proj", self.attend(layer, q, k, v))

    def activate(self, x):
        if self.c["activation"] == "silu":
            return x / (1 + np.exp(-x))
        if self.c["activation"] == "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def gated(self, gate, up):
        if self.c["activation"] != "swiglu_oai":
            return self.activate(gate) * up
        limit = self.c["swiglu_limit"]
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))

    def mlp(self, p, x):
        up = self.linear(p + "up_proj", x)
        gate = self.linear(p + "gate_proj", x) if p + "gate_proj.weight" in self.t else None
        return self.linear(p + "down_proj", self.activate(up) if gate is None else self.gated(gate, up))

    def experts(self, p, x):
        c = self.c
        logits = x @ self.t[p + "router.weight"].T + self.t.get(p + "router.logit_bias", 0)
        scores = softmax(logits) if c["scoring_func"] == "softmax" else 1 / (1 + np.exp(-logits))
        choice = scores + self.t.get(p + "router.bias", 0)
        groups = choice.reshape(len(x), c["n_group"], -1)
        rank = groups.max(axis=-1) if c["group_score"] == "max" else np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        kept = np.argsort(-rank, axis=-1)[:, : c["topk_group"]]
        mask = np.zeros_like(rank, bool)
        np.put_along_axis(mask, kept, True, axis=-1)
        choice = np.where(mask[..., None], groups, -np.inf).reshape(len(x), -1)
        top = np.argsort(-choice, axis=-1)[:, : c["num_experts_per_tok"]]
        weight = np.take_along_axis(scores, top, axis=-1)
        if c["norm_topk_prob"]:
            weight = weight / weight.sum(axis=-1, keepdims=True)
        out = np.zeros_like(x)

        def expert(e, part, x):
            name = f"{p}experts.{part}_proj."
            return self.t[name + "weight"][e] @ x + (self.t[name + "bias"][e] if name + "bias" in self.t else 0)

        for t in range(len(x)):
            for e, w in zip(top[t], weight[t] * c["routed_scaling_factor"], strict=True):
                out[t] += w * expert(e, "down", self.gated(expert(e, "gate", x[t]), expert(e, "up", x[t])))
        return out + self.mlp(p + "shared_experts.", x) if c["n_shared_experts"] else out

    def logits(self, tokens):
        """[T, vocab_size] of a text from its beginning."""
        c = self.c
        x = self.t["embed_tokens.weight"][tokens] * c["embedding_scale"]
        if "position_embedding.weight" in self.t:
            x = x + self.t["position_embedding.weight"][: len(tokens)]
        for layer in range(c["n_layers"]):
            p = f"layers.{layer}."
            h = self.norm(p + "attention_norm", x)
            x = x + c["residual_scale"] * self.norm(p + "attention_post_norm", self.attention(layer, h))
            h = self.norm(p + "mlp_norm", x)
            moe = c.get("n_routed_experts") and c["moe_layers"][layer]
            y = self.norm(p + "mlp_post_norm", self.experts(p, h) if moe else self.mlp(p, h))
            x = x + c["residual_scale"] * y
        x = self.norm("norm", x)
        classifier = "lm_head" if "lm_head.weight" in self.t else "embed_tokens"
        return cap(c["logit_scale"] * self.linear(classifier, x), c["logit_softcap"])
