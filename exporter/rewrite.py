"""Exact rewrites of attention: the same model in another layout of its KV cache (--as)."""

import argparse


def parse(text: str):
    raise argparse.ArgumentTypeError(f"{text!r}: rewrites are not there yet")
