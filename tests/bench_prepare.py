"""How fast data is made ready and read, stage by stage. Run by hand:

    uv run tests/bench_prepare.py FOLDER      climbmix-like shards (*.parquet, column text), the last one is validation

Stages: download from a hub on loopback, tokenizer, tokenizing (one core, and all), the rows of a full-scale evaluation,
packed batches against the plain packer of the tests.
"""

import contextlib
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub import Hub
from test_loader import slow_rows

import prepare

VOCAB_SIZE, B, T = 8192, 16, 2048


@contextlib.contextmanager
def timed(what, unit):
    """Print the time of what happens inside, and how much a second. The amount is to be put into the list."""
    amount, started = [], time.perf_counter()
    yield amount
    seconds = time.perf_counter() - started
    print(f"{what:<34}{seconds:8.2f} s   {sum(amount) / seconds:,.1f} {unit}/s", flush=True)


def main(folder, found):
    names = [f"shard_{i:05d}.parquet" for i in range(len(found) - 1)] + [prepare.VAL_SHARD]
    with Hub(dict(zip(names, found))) as hub, timed("download and verify, loopback", "MB") as amount:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        prepare.download_shards(names, folder / "data", 8)
        amount += [path.stat().st_size / 1e6 for path in found]
    paths = [folder / "data" / name for name in names]
    corpus = prepare.Corpus(paths[:-1], paths[-1:], "", length=None)
    texts = list(prepare.sample_texts(corpus.documents("train")))
    with timed("tokenizer", "M characters") as amount:
        tokenizer = prepare.Tokenizer.train(iter(texts), VOCAB_SIZE)
        amount += [len(text) / 1e6 for text in texts]
    path, available = folder / "train.bin", sorted(os.sched_getaffinity(0))  # Linux only
    for cores in (available[:1], available):
        os.sched_setaffinity(0, cores)
        with timed(f"tokenizing on {len(cores)} core(s)", "M tokens") as amount:
            prepare.write_tokens(tokenizer, corpus.documents("train"), path)
            amount += [path.stat().st_size / 2e6]
    tokens, packed = np.fromfile(path, np.uint16), np.empty((B, T + 1), np.int64)
    with timed("the rows of an evaluation", "M tokens") as amount:
        rows = list(islice(prepare.pack_rows(tokens, T, forever=False), 10_240))
        for i in range(0, len(rows), B):
            prepare.fill_rows(tokens, rows[i : i + B], packed)
        amount += [len(rows) * T / 1e6]
    with timed("the plain packer", "M tokens") as amount:
        amount += [T / 1e6 for _ in islice(slow_rows(tokens[: 10**7], T, passes=10**9), 400)]
    with timed("loader", "M tokens") as amount:
        amount += [B * T / 1e6 for _ in islice(prepare.batches(tokens, B, T, torch.device("cpu")), 2000)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary), sorted(Path(sys.argv[1] if sys.argv[1:] else sys.exit(__doc__)).glob("*.parquet")))
