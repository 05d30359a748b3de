"""From a source to the model that is written."""

from dataclasses import dataclass

import numpy as np

from exporter.architectures import Architecture, architecture_of
from exporter.config import Keys
from exporter.errors import ExportError
from exporter.hyperparameters import hyperparameters
from exporter.names import canonical_tensors
from exporter.source import Source
from exporter.tensors import arrange, check_shapes, tensors_of
from exporter.weights import Tensor, of_array


@dataclass
class Model:
    """What is written: config as docs/model-file.md lists it, tensors by the model file's names."""

    config: dict
    tensors: dict[str, Tensor]


def build(source: Source) -> Model:
    """Reads no weights yet. Throws ExportError for a key or a tensor that is unknown, missing or wrong."""
    architecture, values = architecture_of(source)
    keys = Keys(source, values, architecture.defaults)
    config, tables = hyperparameters(keys, architecture)
    biased = biases(keys, architecture)
    neighbours = architecture.interleaved and keys.flag("rope_interleave", True)
    tied, ahead = keys.flag("tie_word_embeddings"), keys.count("num_nextn_predict_layers")
    keys.finish()

    if source.kind == "config":
        tensors = tensors_of(source, config, architecture, biased, tied)
        return Model(config, tensors | {name: of_array(inv_freq) for name, inv_freq in tables.items()})
    if config["n_layers"] > len(source.tensors):  # before anything is made for each of them
        raise ExportError(
            f"{source.where}: num_hidden_layers is {config['n_layers']}, but there are {len(source.tensors)} tensors: "
            "fetch the checkpoint again, with all its files"
        )
    tensors = canonical_tensors(source, architecture, config["n_layers"], ahead)
    if tied:
        tensors.pop("lm_head.weight", None)
    if not tied and "lm_head.weight" not in tensors:
        raise ExportError(
            f"{source.path}: tensor lm_head.weight is missing and tie_word_embeddings is false: fetch the checkpoint "
            "again, with all its files"
        )
    rotated = 2 * tables["rope.0.inv_freq"].size if neighbours and tables else 0
    arrange(source, architecture, config, rotated, tensors)
    slowed = tensors.pop("rope_freqs.weight", None) if tables else None
    check_shapes(source, architecture, config, tensors, biased)
    for name, inv_freq in tables.items():
        tensors[name] = of_array(inv_freq / slowdown(source, slowed, inv_freq.shape))
    return Model(config, tensors)


def biases(keys: Keys, architecture: Architecture) -> list[str]:
    """Patterns of the biases that the config announces."""
    modules = {"attention_bias": architecture.biased, "mlp_bias": "(gate|up|down)_proj"}
    return [pattern + r"\.bias" for key, pattern in modules.items() if keys.flag(key)]


def slowdown(source: Source, factors: Tensor | None, shape: tuple[int, ...]) -> np.ndarray | int:
    """Llama 3's rope_scaling as GGUF carries it: a tensor of divisors."""
    if factors is None:
        return 1
    if factors.shape != shape:
        raise ExportError(
            f"{source.path}: tensor rope_freqs.weight is {list(factors.shape)}, not {list(shape)}: fetch the file again"
        )
    values = factors.float32()
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ExportError(
            f"{source.path}: tensor rope_freqs.weight holds a factor that is not positive: fetch it again"
        )
    return values
