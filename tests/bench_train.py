"""Speed and memory of train.py files, side by side on this machine. Run it by hand, after `uv run prepare.py`:

    uv run tests/bench_train.py                              train.py: its first run and its second
    uv run tests/bench_train.py old/train.py train.py        two files in turns, to compare them
    uv run tests/bench_train.py --seconds 40 --rounds 3 …    the default
    uv run tests/bench_train.py --load 1 …                   beside one process that keeps a core busy
    uv run tests/bench_train.py --float32 …                  as on a processor that does not multiply in bfloat16

A file may have the original's form (num_steps then has ten steps that its clock does not count). Each run is a whole
one, with the data, clock and evaluation of the harness, on a budget of --seconds. The first one of a file starts with
an empty compiler cache, the later ones use what it left. Printed are the numbers of each run's block, the seconds of
its process outside the budget, and for each file the median of its later runs.

A prediction to compare a profile with, of a step of the full model on an H100 (790 TFLOP/s, 3 TB/s), in ms: matrices of
the blocks 102; norms, rotary, residuals and embeddings 57; attention 41; ReLU² 29 (not done: inside the product before
it); head 17; soft cap and loss 11; optimizer 1. That is 2.0 M tokens/s, 1.22 times the original's 1.67, the aim 1.35.

Memory: the forward pass keeps 0.34 GiB per row of 2,048 tokens, 22 GiB for 64 rows. 128 rows would make 2^31 logits,
one too many for an index of 32 bits. Evaluation computes 1.7 PFLOP and reads 690 GB of logits about five times: 5 s.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import prepare

ROOT = Path(prepare.__file__).parent
COLUMNS = dict(num_steps=",.0f", val_bpb=".4f", total_tokens_M=",.1f", mfu_percent=".1f", peak_vram_mb=",.0f")
COLUMNS |= dict(seconds_outside=".1f")


FLOAT32 = {"_is_avx512_bf16_supported": "_", ".bfloat16()": ".float()", "torch.bfloat16": "torch.float32"}


def run(file, cache, compiler_cache, load, float32):
    """Run a copy of the file beside `load` busy processes. Returns the number of each column."""
    source, copy = file.read_text(), cache / "train.py"
    for name, other in FLOAT32.items() if float32 else ():
        source = source.replace(name, other)
    copy.write_text(source)
    paths = dict(AUTORESEARCH_CACHE=cache, TORCHINDUCTOR_CACHE_DIR=compiler_cache, PYTHONPATH=ROOT)
    environment = os.environ | {name: str(path) for name, path in paths.items()}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
    began = time.monotonic()
    try:
        output = subprocess.run([sys.executable, copy], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
    block = dict(re.findall(r"(?m)^(\w+): +(\S+)$", output.stdout))
    block["seconds_outside"] = time.monotonic() - began - float(block["training_seconds"])
    return [float(block[name]) for name in COLUMNS]


def print_row(title, numbers):
    cells = [format(number, form) for number, form in zip(numbers, COLUMNS.values())]
    print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "train.py"])
    parser.add_argument("--seconds", type=float, default=40, help="of training per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per file, at least two")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside each run")
    parser.add_argument("--float32", action="store_true", help="no bfloat16")
    args = parser.parse_args()
    runs = {file.resolve(): [] for file in args.files}
    print(f"| file | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    with tempfile.TemporaryDirectory() as folder:
        cache, manifest = Path(folder), prepare.load_manifest(prepare.cache_dir())
        manifest["constants"]["TIME_BUDGET"] = args.seconds  # for the same files
        (cache / prepare.MANIFEST).write_text(json.dumps(manifest, default=str))
        for n in range(1, max(args.rounds, 2) + 1):
            for i, (file, results) in enumerate(runs.items()):
                results.append(run(file, cache, cache / f"compiled{i}", args.load, args.float32))
                print_row(f"{file.parent.name}/{file.name}, run {n}", results[-1])
    for file, results in runs.items():
        median = [statistics.median(column) for column in zip(*results[1:])]
        print_row(f"{file.parent.name}/{file.name}, median of the later runs", median)


if __name__ == "__main__":
    main()
