"""Makes smollm2.json and gemma3.json: python make_reference.py SMOLLM2.gguf GEMMA3.gguf   (needs transformers)

The vocabulary is the GGUF file's, the tokenizer around it is put together as in the model's tokenizer.json. GGUF has no
merges for Gemma: transformers' own conversion of SentencePiece models makes them.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import generate_merges

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from test_tokenizer import CORPUS, fuzz  # noqa: E402

from exporter.sources import open_source  # noqa: E402

CONTROL, UNKNOWN, USER_DEFINED = 3, 2, 4


def smollm2(metadata: dict, vocab: dict) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def gemma3(metadata: dict, vocab: dict) -> Tokenizer:
    # In Gemma's tokenizer.model user-defined pieces have a score of 0; the GGUF conversion writes -1000.
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    scores = {text: 0.0 if types[id] == USER_DEFINED else scores[id] for text, id in vocab.items()}
    merges = generate_merges(vocab, scores)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return made


def main() -> None:
    for path, make, name in zip(sys.argv[1:], (smollm2, gemma3), ("smollm2-135m", "gemma-3-270m"), strict=True):
        metadata = open_source(Path(path)).metadata
        types = metadata["tokenizer.ggml.token_type"]
        tokens = metadata["tokenizer.ggml.tokens"]
        tokens = [
            token.replace(" ", "▁") if type == USER_DEFINED else token
            for token, type in zip(tokens, types, strict=True)
        ]
        made = make(metadata, {token: id for id, token in enumerate(tokens)})
        typed = list(zip(tokens, types, strict=True))
        made.add_special_tokens(
            [AddedToken(token, normalized=False) for token, type in typed if type in (CONTROL, UNKNOWN)]
        )
        made.add_tokens([AddedToken(token, normalized=False) for token, type in typed if type == USER_DEFINED])
        texts = CORPUS + fuzz(2, 120)
        ids = [encoding.ids for encoding in made.encode_batch(texts, add_special_tokens=False)]
        around = [metadata["tokenizer.ggml.bos_token_id"]] if metadata["tokenizer.ggml.add_bos_token"] else []
        around += made.encode("a", add_special_tokens=False).ids
        reference = {"file": name, "around_a": around, "texts": texts, "ids": ids}
        (HERE / f"{make.__name__}.json").write_text(json.dumps(reference, ensure_ascii=False), "utf-8")


main()
