"""A train.py written before this harness: own clock, a batch fetched before the loop, a compiled model that also
answers without targets. It works unchanged; that its time ran over is said, not punished."""

import re
import shutil

from conftest import ROOT, run_python

OLDER = """
import time
import torch
import torch.nn as nn
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb, get_token_bytes

class Bigram(nn.Embedding):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx).float()
        if targets is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

torch.manual_seed(42)
tokenizer = Tokenizer.from_directory()
V = tokenizer.get_vocab_size()
assert get_token_bytes().shape == (V,)
model = torch.compile(Bigram(V, V), dynamic=False, backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
train_loader = make_dataloader(tokenizer, 16, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)  # and only then everything is compiled
time.sleep(2)
total, step = 0, 0
while total < TIME_BUDGET:
    t0 = time.time()
    loss = model(x, y, reduction="none").mean()
    x, y, epoch = next(train_loader)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if step > 10:
        total += time.time() - t0
model.eval()
with torch.autocast("cpu", torch.bfloat16):
    val_bpb = evaluate_bpb(model, tokenizer, 16)
print(f"val_bpb: {val_bpb:.6f}")
"""


def test_an_older_train_py_works_unchanged(tmp_path, session_cache):
    shutil.copy(ROOT / "prepare.py", tmp_path)
    (tmp_path / "train.py").write_text(OLDER)
    done = run_python("train.py", cwd=tmp_path, cache=session_cache)
    assert done.returncode == 0, done.stderr
    assert 0.1 < float(re.search(r"^val_bpb: +(\d+\.\d{6})$", done.stdout, re.MULTILINE)[1]) < 4
    assert re.search(r"warning: training took \d+\.\d s of a budget of 2 s", done.stderr)
