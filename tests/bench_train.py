"""Speed and memory of train.py files, side by side on this machine. Run it by hand, after `uv run prepare.py`:

    uv run tests/bench_train.py                              train.py: its first run and its second
    uv run tests/bench_train.py old/train.py train.py        two files in turns, to compare them
    uv run tests/bench_train.py --seconds 40 --rounds 3 …    the default

Each run is a whole one, with the data, clock and evaluation of the harness, on a budget of --seconds. The first run of
a file starts with an empty compiler cache, the later ones use what it left. Printed for each file: the median of tokens
per second, MFU, peak memory, and the seconds outside the budget (until the first batch, and from the last step to the
end) for the first run and as the median of the later ones.

Lower bounds for one step of the full model on an H100: 2^19 tokens, 790 TFLOP/s on random bfloat16, 3.0 TB/s. The
operations are counted by hand, the bytes as torch.compile of PyTorch 2.9.1 plans its kernels for compute capability
9.0, each tensor once per kernel. This is computed without a GPU: a prediction to compare a profile with, not a
measurement. The last column is the larger of both, kernel by kernel.

    stage                                         TFLOP     GB    ms: operations   bytes   bound
    matrices of the blocks                         79.2    236            100       79     102
    head                                           13.2     27             17        9      17
    attention, windows as they are, 5/2 backward   25.0     52             32       17      32
    softcap and loss, with backward                         26                       9       9
    ReLU² with backward                                     86                      29      29
    norms, rotary, residuals, value embeddings             163                      54      54
    sum                                                                                    243

That is 2.2 M tokens/s, 1.30 times the original's 1.67. The aim is 1.35. What could bring it, largest first:
- norm before rotary instead of after it: 163 GB instead of 215 (17 ms). Done, with the same result;
- ReLU² inside the matrix product before it, with a Triton product or autotuning: up to 29 ms. Not done;
- one product for Q, K, V: 26 GB less in the products, where operations take longer than bytes, and 10 GB more around
  them: no gain in this plan. Not done;
- logits: the compiler keeps them in bfloat16 and computes loss and gradient in three passes of 8.6 GB. A kernel of our
  own would save one of them (3 ms). Not done;
- AdamW is one kernel per table, Muon 36 per shape: some milliseconds together;
- the loss is read once per step, after some 1,500 kernels were queued: some tenths of a millisecond.

Memory: the forward pass keeps 0.34 GiB per row of 2,048 tokens, 0.125 of it around ReLU²: 22 GiB for 64 rows. 128 rows
would take 44 GiB and make 2^31 logits, one too many for an index of 32 bits.

Outside the budget: evaluation computes 1.7 PFLOP forward and reads 690 GB of float32 logits about five times, about
5 s. Packing its rows takes 0.06 s, checking a GB of token files 0.5 s (bench_prepare.py, two CPU cores).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import json, runpy, sys, time
began = time.monotonic()
sys.path.insert(0, sys.argv[1])
import prepare
constants = prepare.load_manifest(prepare.cache_dir())["constants"]
constants["TIME_BUDGET"] = prepare.TIME_BUDGET = float(sys.argv[3])
moments, start, stop = {}, prepare.Clock.start, prepare.Clock.stop

def record(name, method):
    def call(self):
        moments.setdefault(name, time.monotonic() - began)
        return method(self)
    return call

def report(val_bpb, *, mfu_percent, total_tokens, num_steps, attention, **_):
    seconds = prepare.clock.seconds()
    print("RESULT", json.dumps(dict(
        rate=total_tokens / seconds, mfu=mfu_percent, memory=prepare.peak_memory_mb(), steps=num_steps,
        before=moments["start"], after=time.monotonic() - began - moments["stop"], val_bpb=val_bpb,
        attention=attention, device=prepare.device_name(),
    )))

prepare.Clock.start, prepare.Clock.stop = record("start", start), record("stop", stop)
prepare.report = report
sys.argv = [sys.argv[2]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(file, seconds, compiler_cache):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache)}
    environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # RUN imports PyTorch before train.py can set it
    command = [sys.executable, "-c", RUN, ROOT, file, str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{done.stdout}{file} failed with exit status {done.returncode}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    print(
        f"{file}: {result['rate']:,.0f} tokens/s, MFU {result['mfu']:.1f} %, {result['memory']:,.0f} MiB, "
        f"{result['before']:.1f} + {result['after']:.1f} s outside, {result['steps']} steps, "
        f"val_bpb {result['val_bpb']:.4f}, {result['attention']}, {result['device']}",
        flush=True,
    )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "train.py"])
    parser.add_argument("--seconds", type=float, default=40, help="of training per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per file, at least two")
    args = parser.parse_args()
    files = [file.resolve() for file in args.files]
    runs = {file: [] for file in files}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(max(args.rounds, 2)):
            for i, file in enumerate(files):
                runs[file].append(run(file, args.seconds, Path(folder) / str(i)))

    def median(results, key):
        return statistics.median(result[key] for result in results)

    print("\n| file | tokens/s | MFU | peak memory | outside, first run | outside, later |\n|---|---|---|---|---|---|")
    for file, results in runs.items():
        first, later = results[0], results[1:]
        print(
            f"| {file.parent.name}/{file.name} | {median(results, 'rate'):,.0f} | {median(results, 'mfu'):.1f} % "
            f"| {median(results, 'memory'):,.0f} MiB | {first['before']:.1f} + {first['after']:.1f} s "
            f"| {median(later, 'before'):.1f} + {median(later, 'after'):.1f} s |"
        )


if __name__ == "__main__":
    main()
