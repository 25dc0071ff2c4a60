"""How fast data is made ready and read, stage by stage. Run by hand:

    uv run tests/bench_prepare.py [FOLDER]      a folder of climbmix-like shards (*.parquet, column text)

Without a folder it makes shards from the Python source on this machine. Stages: download from a hub on loopback,
tokenizer, tokenizing (all cores, and one), opening the cache as every run does, the rows of a full-scale evaluation,
packed batches against the plain packer of the tests.
"""

import argparse
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub import Hub
from test_loader import slow_rows

import prepare


def timed(what, work, unit, amount):
    """Run work() and print its time, and `amount` (a number, or a function of the result) per second."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    rate = (amount(result) if callable(amount) else amount) / seconds
    print(f"{what:<34}{seconds:8.2f} s   {rate:,.1f} {unit}/s", flush=True)
    return result


def source_shards(folder):
    """Four shards of Python source, 20 MB of text each, as climbmix lays them out."""
    texts = prepare.source_corpus().documents("train")
    for i in range(4):
        shard, size = [], 0
        while size < 20e6:
            shard.append(next(texts))
            size += len(shard[-1])
        pq.write_table(pa.table({"text": shard}), folder / f"{i}.parquet", compression="zstd", row_group_size=512)
    return sorted(folder.glob("*.parquet"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="shards; the last in name order is validation")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=16, help="rows a batch of the loader")
    args = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))  # Linux only
    cores = len(available)
    print(f"{cores} cores, vocabulary {args.vocab_size:,}, rows of 2,048 tokens, {args.rows} a batch")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = sorted(args.folder.glob("*.parquet")) if args.folder else source_shards(folder)
        names = [f"shard_{i:05d}.parquet" for i in range(len(found) - 1)] + [prepare.VAL_SHARD]
        megabytes = sum(path.stat().st_size for path in found) / 1e6
        with Hub(dict(zip(names, found))) as hub:
            os.environ["HF_ENDPOINT"] = hub.endpoint
            data = folder / "data"
            timed("download and verify, loopback", lambda: prepare.download_shards(names, data, 8), "MB", megabytes)
        timed("again, nothing to do", lambda: prepare.download_shards(names, data, 8), "MB", megabytes)
        paths = [data / name for name in names]
        corpus = prepare.Corpus(paths[:-1], paths[-1:], "", length=None)
        texts = list(prepare.sample_texts(corpus.documents("train")))
        characters = sum(map(len, texts)) / 1e6
        print(f"{'':<34}{characters:8.1f} M characters for the tokenizer")
        train = lambda: prepare.Tokenizer.train(iter(texts), args.vocab_size)  # noqa: E731
        tokenizer = timed("tokenizer", train, "M characters", characters)

        def tokenize(cpus):
            os.sched_setaffinity(0, available[:cpus])
            prepare.write_tokens(tokenizer, corpus.documents("train"), folder / f"train-{cpus}.bin")
            os.sched_setaffinity(0, available)
            return (folder / f"train-{cpus}.bin").stat().st_size / 2e6

        for cpus in sorted({1, cores}):
            timed(f"tokenizing on {cpus} core(s)", lambda: tokenize(cpus), "M tokens", float)  # noqa: B023
        path = folder / f"train-{cores}.bin"
        timed("checking the token file", lambda: prepare.checksum(path), "MB", path.stat().st_size / 1e6)

        tokens = prepare.np.fromfile(path, prepare.np.uint16)

        def evaluation_rows():
            rows = list(islice(prepare.pack_rows(tokens, 2048, forever=False), 10_240))
            packed = prepare.np.empty((args.rows, 2049), prepare.np.int64)
            for i in range(0, len(rows), args.rows):
                prepare.fill_rows(tokens, rows[i : i + args.rows], packed)
            return len(rows)

        timed("the rows of an evaluation", evaluation_rows, "M tokens", lambda rows: rows * 2048 / 1e6)
        rows = slow_rows(tokens[: 10**7], 2048, passes=10**9)
        timed("the plain packer, 400 rows", lambda: list(islice(rows, 400)), "M tokens", 400 * 2048 / 1e6)
        loader = islice(prepare.batches(tokens, args.rows, 2048, torch.device("cpu")), 2000)
        timed("loader, 2,000 batches", lambda: sum(1 for _ in loader), "M tokens", 2000 * args.rows * 2048 / 1e6)


if __name__ == "__main__":
    main()
