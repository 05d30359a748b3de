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
from exporter.weights import Tensor, of_array, same_values


@dataclass
class Model:
    """What is written: config as docs/model-file.md lists it, tensors by the model file's names."""

    config: dict
    tensors: dict[str, Tensor]


@dataclass
class Settings:
    """What a source's config says: the model file's config, its RoPE tables by name, and what the tensors are to be."""

    architecture: Architecture
    config: dict
    tables: dict[str, np.ndarray]
    biased: list[str]  # patterns of the biases that must be there
    neighbours: bool  # RoPE rotates neighbours
    tied: bool  # embed_tokens is the classifier
    ahead: int  # layers after the last


def read_config(source: Source) -> Settings:
    """Throws ExportError for a key that is unknown, missing or wrong."""
    architecture, values = architecture_of(source)
    keys = Keys(source, values, architecture.defaults)
    config, tables = hyperparameters(keys, architecture)
    settings = Settings(
        architecture,
        config,
        tables,
        biased=biases(keys, architecture),
        neighbours=architecture.interleaved and keys.flag("rope_interleave", True),
        tied=keys.flag("tie_word_embeddings"),
        ahead=keys.count("num_nextn_predict_layers"),
    )
    keys.finish()
    return settings


def build(source: Source) -> Model:
    """Reads hardly any weights yet. Throws ExportError for a key or a tensor that is unknown, missing or wrong."""
    settings = read_config(source)
    architecture, config, tables = settings.architecture, settings.config, settings.tables
    if source.kind == "config":
        tensors = tensors_of(source, config, architecture, settings.biased, settings.tied)
        return Model(config, tensors | {name: of_array(inv_freq) for name, inv_freq in tables.items()})
    if config["n_layers"] > len(source.tensors):  # before anything is made for each of them
        raise ExportError(
            f"{source.where}: num_hidden_layers is {config['n_layers']}, but there are {len(source.tensors)} tensors: "
            "fetch the checkpoint again, with all its files"
        )
    tensors = canonical_tensors(source, architecture, config["n_layers"], settings.ahead)
    tie(source, settings.tied, tensors)
    rotated = 2 * tables["rope.0.inv_freq"].size if settings.neighbours and tables else 0
    arrange(source, architecture, config, rotated, tensors)
    slowed = tensors.pop("rope_freqs.weight", None) if tables else None
    check_shapes(source, architecture, config, tensors, settings.biased)
    for name, inv_freq in tables.items():
        tensors[name] = of_array(inv_freq / slowdown(source, slowed, inv_freq.shape))
    return Model(config, tensors)


def tie(source: Source, tied: bool, tensors: dict[str, Tensor]) -> None:
    """The classifier, as transformers 5 finds it (modeling_utils.py, tie_weights): where the config ties it but it is
    stored, and with other values, it is the one that is stored."""
    embedding, classifier = "embed_tokens.weight", "lm_head.weight"
    if not tied and classifier not in tensors:
        raise ExportError(
            f"{source.path}: tensor lm_head.weight is missing and tie_word_embeddings is false: fetch the checkpoint "
            "again, with all its files"
        )
    if not tied or classifier not in tensors:
        return
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(classifier)
    elif same_values(tensors[embedding], tensors[classifier]):
        del tensors[classifier]
    else:
        source.notes.append(
            "tie_word_embeddings is true, but lm_head.weight is stored with other values: it is kept, as transformers "
            "5 does"
        )


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
