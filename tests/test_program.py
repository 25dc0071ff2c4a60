"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

Runs are a stand-in, but for one of the real train.py. uv is one too: a scratch clone would install everything anew.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import prepare

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(*words, page=ONE_GPU, but="nothing of this kind"):
    """The one command of program.md, without its section on several GPUs, that has all these words."""
    found = [text for text in blocks(page) if all(word in text for word in words) and but not in text]
    assert len(found) == 1, (words, found)
    return found[0]


RUN = command("run prepare.py run\n").strip()
(BRANCH,) = re.findall(r"`(git switch -c [^`]*)`", ONE_GPU)
CHECK, DISCARD = re.findall(r"`(uv run prepare.py (?:run check|discard))`", ONE_GPU)[::-1]
LOOK = command("tail -n 35")

NOISE = [0.003, 0, -0.001, 0.002, 0.001, -0.003, -0.002, 0]  # of seeds 0 to 7; others by their last digit
STAND_IN = f"""
VALUE = 1.0
#
MORE = 0
#
FAULT = ""
import json, os, pathlib, signal, subprocess, sys, time
where, began = os.environ.get("SLURMD_NODENAME", "here") + ":" + os.environ.get("CUDA_VISIBLE_DEVICES", ""), time.time()
path, seed = pathlib.Path(os.environ["AUTORESEARCH_REPORT"]), int(os.environ["SEED"])
run = json.loads(pathlib.Path("run.json").read_text())["row"]
with open(os.environ["STARTS"], "a") as starts:
    starts.write(f"{{run[0]}} {{seed}} {{os.getpid()}}\\n")
report = dict(memory_gb="0.5", num_steps=9, attention="sdpa", harness="0123456789ab", problems=[])
print("step 1", flush=True)
time.sleep(0.2)
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
path.write_text(json.dumps(report | {{"val_bpb": f"{{value:.6f}}"}}))
"""
CONSTANTS = {"WAIT = 45": "WAIT = 5", "PAUSE, BEAT = 10, 3": "PAUSE, BEAT = 2, 1"}


class Clone:
    """A scratch repository in which an agent with no memory types commands."""

    def __init__(self, folder, cache, train=STAND_IN, **constants):
        self.folder = folder
        folder.mkdir()
        for name in ("prepare.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        prepare_py = (folder / "prepare.py").read_text(encoding="utf-8")
        for old, new in (CONSTANTS | constants).items():
            assert prepare_py.count(old) == 1
            prepare_py = prepare_py.replace(old, new)
        (folder / "prepare.py").write_text(prepare_py, encoding="utf-8")
        (folder / "train.py").write_text(train, encoding="utf-8")
        tools = folder.parent / "bin"
        tools.mkdir()
        uv = tools / "uv"
        # like uv: one process more, which passes SIGTERM on
        uv.write_text(
            '#!/bin/bash\nshift; [ "$1" = python ] && shift\n'
            f'"{sys.executable}" "$@" & trap "kill $!" TERM; wait $!; status=$?; wait $! 2>/dev/null; exit $status\n'
        )
        uv.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.env |= {"AUTORESEARCH_CACHE": str(cache), "GIT_CONFIG_GLOBAL": os.devnull, "STARTS": f"{folder}-starts"}
        self.sh("git init -q -b main && git config user.name agent && git config user.email a@example.org")
        self.sh("git add -A && git commit -qm start")

    def sh(self, text, ok=True, **env):
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.env | env, capture_output=True, timeout=120
        )
        done.stdout, done.stderr = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        assert not ok or done.returncode == 0, (text, done.stdout, done.stderr)
        return done.stdout

    def edit(self, value, fault="", tree=".", name="VALUE"):
        path = self.folder / tree / "train.py"
        text = re.sub(f"^{name} = .*", f"{name} = {value}", path.read_text(), flags=re.M)
        path.write_text(re.sub("^FAULT = .*", lambda _: f"FAULT = {fault!r}", text, flags=re.M))

    def commit(self, value, what, fault=""):
        """The commit of an idea"""
        self.edit(value, fault)
        self.sh(command("git commit -qm", but="-C").replace("WHAT CHANGES", what))
        return self.head()

    def run(self, command=RUN, **env):
        """What the command prints when it no longer says wait"""
        deadline = time.monotonic() + 60
        while (printed := self.sh(f"{command} 2>&1", ok=False, **env)).startswith("wait"):
            assert time.monotonic() < deadline, printed
        return printed

    def idea(self, value, what, fault=""):
        """The row of an idea: committed, run and recorded"""
        commit = self.commit(value, what, fault)
        printed = self.run()
        assert printed.startswith("idea: head ") and f"\n{commit}\t" in printed, printed
        return self.rows()[-1]

    def background(self):
        """A run that has been started, while nobody waits for it"""
        process = subprocess.Popen(["bash", "-c", RUN], cwd=self.folder, env=self.env, start_new_session=True)
        self.wait(lambda: self.starts(self.head()))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return int(self.starts(self.head())[-1][2])

    def head(self, tree="."):
        return self.sh(f"git -C {tree} rev-parse HEAD")[:7]

    def starts(self, commit=None):
        """[[commit, seed, pid] of each start]"""
        path = Path(self.env["STARTS"])
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if commit in (None, line[0])]

    def wait(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.starts()
            time.sleep(0.1)

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


def lives(pid):
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def clone(tmp_path, session_cache):
    return Clone(tmp_path / "clone", session_cache, **{"GRACE = 540": "GRACE = 4"})


def baseline(clone):
    clone.sh("git switch -q autoresearch/t 2>/dev/null || git switch -q -c autoresearch/t")
    assert clone.run().startswith("idea: head ")
    return clone.head()


def test_a_night_in_small(clone):
    # Set-up
    (clone.folder / "results.tsv").write_text("an earlier night")
    assert re.fullmatch("agent <a@example.org> .*\n", clone.sh(command("GIT_AUTHOR_IDENT")))
    clone.sh(BRANCH)
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}-\d{4}", branch)
    assert "results.tsv is no table of this prepare.py" in clone.run()
    clone.sh("mv results.tsv results-before.tsv")

    # The noise: three seeds in one call
    base, printed = clone.head(), clone.sh(RUN)
    assert [row[:1] + row[3:7] for row in clone.rows()[1:]] == [
        [base, "keep", f"baseline, seed {seed}, 9 steps", str(seed), str(seed + 1)] for seed in range(3)
    ]
    scores = [float(row[1]) for row in clone.rows()[1:]]
    head, margin = statistics.mean(scores), 1.5 * statistics.stdev(scores)
    assert printed.startswith(f"idea: head {head:.6f}, margin {margin:.6f}, n 0: ") and clone.run() == printed

    # Kept; discarded
    assert clone.idea(0.9, "batch 2^9")[1:5] == ["0.903000", "0.5", "keep", "batch 2^9, 9 steps"]
    kept = clone.head()
    assert clone.rows()[-1][0] == kept and clone.run() == clone.run()
    (clone.folder / "README.md").write_text("the human's own, not committed")
    row = clone.idea(0.95, "checkpoint\tactivations")
    assert row[3:5] == ["discard", "checkpoint activations, 9 steps"] and clone.head() == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    clone.sh("git restore README.md")
    assert ", n 1: " in clone.run()

    # Crashes: with a line that is too long to show, with noise after it; time exceeded; killed; a hang
    tried = [row[0]]
    for what, fault, why in (
        ("odd", "print('x' * 10**6); import atexit; atexit.register(print, 'leaked'); 1 / 0", "ZeroDivisionError: div"),
        ("late", "report['problems'] = ['training took 9 s']", "training took 9 s"),
        ("killed", "os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL: step 1"),
        ("hang", "time.sleep(500)", "hang: no end after 6 s"),
    ):
        row = clone.idea(0.8, what, fault)
        assert row[1:4] == ["0.000000", "0.0", "crash"] and row[4].startswith(f"{what}: {why}")
        assert clone.head() == kept and len(clone.sh(LOOK)) < 7000
        tried.append(row[0])
    assert 'run.py", line ' in clone.sh("cat run.log")  # where it hung
    # A slip is mended: a row of its own
    clone.sh(f"git cherry-pick -n tried/{tried[1]}")
    clone.edit(0.95)
    clone.sh("git commit -qm mended train.py")
    clone.run()
    tried.append(clone.rows()[-1][0])
    # One that would be kept, but for the human's limits
    tried.append(clone.idea(0.6, "simpler: batch 2^8")[0])
    assert clone.rows()[-1][3] == "keep" and f"\n{tried[-1]}\t0.603000\t0.5\tdiscard\tsimpler" in clone.sh(DISCARD)
    assert clone.head() == kept and "only a keep of the last wave" in clone.sh(f"{DISCARD} 2>&1", ok=False)

    # The check finds commits and seeds, three each, and moves no bar
    before = clone.run().splitlines()[0]
    printed = clone.run(CHECK)
    assert printed.splitlines() == [
        "idea: the check is complete",
        f"baseline {base}, 3 of 3 fresh seeds: {1 + statistics.mean(NOISE[:3]):.6f} (0.999 to 1.003)",
        f"branch {kept}, 3 of 3 fresh seeds: {0.9 + statistics.mean(NOISE[:3]):.6f} (0.899 to 0.903)",
    ]
    assert clone.run(CHECK) == printed and clone.run().splitlines()[0] == before
    assert [[row[0], row[5]] for row in clone.rows()[-6:]] == [
        [c, str(s)] for s in (100, 101, 102) for c in (kept, base)
    ]

    # After the night
    rows = clone.rows()
    assert (
        rows[0] == list(prepare.Row._fields)
        and {len(row) for row in rows} == {10}
        and {r[8] for r in rows[1:]} == {branch}
    )
    assert "".join(row[3][0] for row in rows[1:]) == "kkkkdccccddkkkkkk"
    assert clone.sh("git status --porcelain -uno") == "" and clone.sh("git ls-files results.tsv run.*") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, base]
    assert sorted(clone.sh("git tag").split()) == sorted(f"tried/{commit}" for commit in tried)
    # A second night in the same table
    clone.sh("git switch -q -c autoresearch/second")
    assert "head 0.900667, " in clone.run() and [row[0] for row in clone.rows()[-3:]] == [kept] * 3
    # On no branch of a night nothing is done
    clone.sh("git switch -q main")
    for words in (RUN, DISCARD):
        assert "this is main: git switch to it" in clone.sh(f"{words} 2>&1", ok=False)


def test_a_real_run(tmp_path, session_cache):
    clone = Clone(tmp_path / "clone", session_cache, (ROOT / "train.py").read_text(encoding="utf-8"))
    clone.env["CUDA_VISIBLE_DEVICES"] = ""
    clone.sh("git switch -q -c autoresearch/t")
    while not (clone.folder / "results.tsv").exists():
        clone.sh(f"{RUN} --wait 1; {LOOK}")
    assert re.fullmatch(r"\w{7} \d\.\d{6} \d\.\d keep baseline, seed 0, \d+ steps", " ".join(clone.rows()[1][:5]))


def test_what_was_cut_off_starts_again_and_nothing_of_it_lives_on(clone):
    baseline(clone)
    commit = clone.commit(0.9, "slow", "time.sleep(3); subprocess.Popen(['sleep', '99'])")
    pid = clone.background()
    os.kill(parent(pid), signal.SIGKILL)
    clone.wait(lambda: not lives(pid))  # it goes with its supervisor
    assert clone.sh(f"{RUN} --wait 1").startswith("wait: 1 of 1 runs, start 2: ")
    assert f"{commit}\t0.903000\t0.5\tkeep" in clone.run() and len(clone.starts(commit)) == 2


KILLER = """
import os, signal, subprocess, sys
events = 0
def deadly(function):
    def call(*arguments, **options):
        global events
        events += 1
        if events == int(os.environ["N"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
if sys.argv[0].endswith("prepare.py") and sys.argv[1] != "supervise" and "N" in os.environ:
    subprocess.Popen.__init__ = deadly(subprocess.Popen.__init__)
    for name in ("replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
"""


@pytest.mark.parametrize("value", [0.9, 1.2])
def test_a_command_that_dies_anywhere_goes_on(clone, value):
    """kill -9 before the n-th process that it starts or file that it replaces, for each n, in `run` and `discard`."""
    base = baseline(clone)
    (clone.folder.parent / "killer").mkdir()
    (clone.folder.parent / "killer/sitecustomize.py").write_text(KILLER)
    path = {"PYTHONPATH": str(clone.folder.parent / "killer")}

    def survive(command, ends):
        for n in range(1, 90):
            printed = clone.sh(f"{command} 2>&1", ok=False, N=str(n), **path)
            if re.match(ends, printed):
                return n
            assert "Killed" in printed or not printed, printed

    commit = clone.commit(value, "idea", "time.sleep(1)")
    assert 12 < survive(f"{RUN} --wait 0", "wait: ") < 30  # it has been started
    clone.edit(-0.3, "time.sleep(1)", name="MORE")
    clone.wait(lambda: any(path.stat().st_size > 5 for path in clone.folder.glob("run.*.end")))
    assert 12 < survive(RUN, "idea: ") < 60  # and is recorded
    assert clone.run().startswith("idea: ") and len(clone.starts(commit)) == 1
    assert [row[3] for row in clone.rows() if row[0] == commit] == ["keep" if value < 1 else "discard"]
    if value < 1:
        assert clone.head() == commit and "-0.3" in clone.sh("git diff train.py")
        assert 12 < survive(DISCARD, "idea: |.*only a keep") < 60
    assert clone.run().startswith("idea: ") and clone.head() == base and clone.rows()[-1][3] == "discard"
    assert clone.sh("git tag") == f"tried/{commit}\n" and clone.sh("git status --porcelain -uno") == ""
    (patch,) = clone.folder.glob("edit-*.patch")
    assert "+MORE = -0.3" in patch.read_text()


def test_two_at_once(clone):
    baseline(clone)
    for value in (1.2, 0.9):
        commit = clone.commit(value, "two", "time.sleep(1)")
        printed = clone.sh(f"({RUN} & {RUN} & wait) 2>/dev/null")
        assert printed.count("idea: head ") == 2 and len(clone.starts(commit)) == 1
        assert [row[0] for row in clone.rows()].count(commit) == 1
    assert clone.head() == commit


def test_a_terminal_that_is_closed(clone):
    baseline(clone)
    clone.commit(0.9, "twice", "time.sleep(2)")
    clone.sh(f"timeout 1 script -qec 'bash --norc -ic \"{RUN}; exit\"' /dev/null", ok=False)  # it hangs up
    assert "\tkeep\ttwice, 9 steps" in clone.run() and len(clone.starts(clone.head())) == 1


def test_an_edit_without_a_commit_is_laid_aside_where_the_tree_moves(clone):
    base = baseline(clone)
    clone.edit(0.8)
    assert "note: train.py has an edit without a commit: it did not run" in clone.run()
    clone.sh("git restore train.py")
    clone.commit(1.2, "worse", "time.sleep(1)")
    clone.background()
    clone.edit(-0.3, "time.sleep(1)", name="MORE")
    clone.sh("printf '# no UTF-8: \\xff' >> train.py && git add train.py")
    printed = clone.run()
    assert printed.startswith("idea: ") and clone.rows()[-1][3] == "discard" and clone.head() == base
    assert clone.sh("git status --porcelain -uno") == "" and clone.run() == printed
    back, patch = re.search("laid aside: `(.*)` brings it back, then remove (.*)", printed).groups()
    clone.sh(f"{back} && rm {patch}")
    assert "note: an edit" not in clone.run()
    edit = subprocess.check_output(["git", "diff", "HEAD"], cwd=clone.folder)
    assert re.findall(rb"^[+-]\w+ =.*", edit, re.M) == [b"-MORE = 0", b"+MORE = -0.3"] and b"\xff" in edit


def test_a_conflict_that_is_open_is_laid_aside_too(clone):
    baseline(clone)
    tried = clone.idea(1.2, "worse")[0]
    assert clone.idea(0.9, "better")[3] == "keep"
    clone.sh(f"git cherry-pick -n tried/{tried}", ok=False)
    assert "<<<<<<<" in (clone.folder / "train.py").read_text()
    assert clone.sh(DISCARD).startswith("idea: head 1.00") and clone.rows()[-1][3] == "discard"
    (patch,) = clone.folder.glob("edit-*.patch")
    assert "+<<<<<<<" in patch.read_text() and clone.sh("git status --porcelain -uno") == ""


def test_the_human_commits_in_the_night(clone):
    baseline(clone)
    clone.idea(1.3, "first")
    clone.sh("echo >> program.md && git commit -qam before")
    clone.commit(0.9, "under", "time.sleep(1)")
    clone.sh("echo >> program.md && git commit -qam after")
    clone.run()
    assert clone.rows()[-1][3:5] == ["keep", "under, 9 steps"] and clone.sh("git log --format=%s -n 1") == "after\n"
    assert clone.idea(1.2, "next")[3] == "discard" and clone.sh("git log --format=%s -n 1") == "after\n"
    clone.commit(1.2, "worse")
    clone.sh("echo >> program.md && git commit -qam above && echo mine >> README.md")
    assert clone.run().startswith("idea: head 0.903000, ") and clone.rows()[-1][3:5] == ["discard", "worse, 9 steps"]
    assert clone.sh("git log --format=%s -n 3") == "above\nafter\nunder\n"
    assert clone.sh("git status --short -uno") == " M README.md\n" and "mine" in clone.sh("cat README.md")


def test_a_table_or_a_run_of_another_kind(clone):
    baseline(clone)
    clone.idea(1.2, "worse")
    table, run = clone.folder / "results.tsv", clone.folder / "run.json"
    rows, facts = table.read_bytes(), json.loads(run.read_text())
    wrong = dict.fromkeys([b"", rows.decode().encode("utf-16"), b"commit\n"], "is no table of this prepare.py")
    for other, why in (wrong | {rows[:-60]: "has a damaged line", rows + b"\n": "has a damaged line"}).items():
        table.write_bytes(other)
        printed = clone.run()
        assert f"results.tsv {why}" in printed and printed.count("\n") == 1
    table.write_bytes(rows)
    for other in (facts | {"row": facts["row"][:-1]}, {"row": 5}, [], {}):
        run.write_text(json.dumps(other))
        assert clone.run().startswith("idea: head ")
    # A new table: the baseline is the head, not what ran last
    run.write_text(json.dumps(facts))
    table.unlink()
    assert clone.run().startswith("idea: head 1.00") and {row[0] for row in clone.rows()[1:]} == {clone.head()}
    assert facts["row"][0] != clone.head()


def test_a_run_lives_as_long_as_its_supervisor(clone):
    """However long that takes to end; and a cache named from where the command was typed is found."""
    cache = Path(clone.env["AUTORESEARCH_CACHE"])
    clone.env["AUTORESEARCH_CACHE"] = os.path.relpath(cache, clone.folder)
    baseline(clone)
    commit = clone.commit(0.9, "slow to end", "time.sleep(2)")
    supervisor = parent(clone.background())
    os.kill(supervisor, signal.SIGSTOP)
    for _ in range(2):
        assert clone.sh(f"{RUN} --wait 4").startswith("wait: ")
    os.kill(supervisor, signal.SIGCONT)
    assert f"\n{commit}\t0.903000\t0.5\tkeep" in clone.run() and len(clone.starts(commit)) == 1


def test_what_is_committed_during_a_run_costs_it_nothing(clone):
    """The human's page, and the agent's next idea: the run is recorded before the shape of the branch is judged."""
    baseline(clone)
    commit = clone.commit(1.2, "runs", "time.sleep(2)")
    clone.background()
    clone.sh("echo >> program.md && git commit -qam page")
    clone.edit(-0.4, "time.sleep(2)", name="MORE")
    clone.sh("git commit -qm 'too early' train.py")
    mend = re.findall("`(git -C [^`]*)`", clone.run())
    assert clone.rows()[-1][:1] + clone.rows()[-1][3:5] == [commit, "discard", "runs, 9 steps"]
    assert len(clone.starts(commit)) == 1
    clone.sh(" && ".join(mend))
    clone.run()
    assert clone.rows()[-1][3:5] == ["keep", "too early, 9 steps"]
    assert clone.sh("git log --format=%s -n 3").split("\n")[:2] == ["too early", "page"]


def test_what_is_refused_names_what_mends_it(clone):
    base = baseline(clone)
    clone.commit(0.9, "another cache", "report |= dict(harness='ba9876543210')")
    for starts in (1, 2):
        assert "the harness is ba9876543210, that of the baseline 0123456789ab: undo" in clone.run()
        assert len(clone.starts(clone.head())) == starts and len(clone.rows()) == 4

    def mend():
        printed = clone.run()
        assert "an idea is one commit on top of" in printed
        clone.sh(" && ".join(re.findall("`(git -C [^`]*)`", printed)).replace("WHAT", "mended"))

    clone.sh("git reset -q --hard HEAD~1 && echo >> README.md")
    clone.edit(0.9)
    clone.sh("git commit -qam 'another file too'")
    mend()
    assert clone.sh("git diff --name-only HEAD") == "README.md\n"  # it is not lost
    clone.edit(0.8)
    clone.sh("git restore -S README.md && git restore README.md && git commit -qam 'two commits'")
    mend()
    assert clone.run().startswith("idea: ") and clone.rows()[-1][3:5] == ["keep", "mended, 9 steps"]
    clone.sh("git reset -q --hard HEAD~1")
    clone.edit(0.5, name="MORE")
    clone.sh("git commit -qam 'from the wrong commit'")
    mend()
    assert clone.run().startswith("idea: ") and clone.rows()[-1][1:4:2] == ["1.303000", "discard"]
    assert base in clone.sh("git log --format=%h")
    assert "invalid choice" in clone.sh("uv run prepare.py run twice 2>&1", ok=False)


def test_a_baseline_needs_a_number(clone):
    clone.edit(1.0, "1 / 0")
    clone.sh("git switch -q -c autoresearch/t && git commit -qam 'a bad start'")
    for _ in range(2):
        assert "the baseline has no number (ZeroDivisionError" in clone.run()
    clone.edit(1.0)
    clone.sh("git commit -qam 'a good start'")
    assert clone.run().startswith("idea: ") and {row[0] for row in clone.rows()[1:]} == {clone.head()}


def test_the_baseline_stays_where_it_was_begun(clone):
    base = clone.head()
    clone.edit(1.0, "time.sleep(1)")
    clone.sh("git switch -q -c autoresearch/t && git commit -qam start")
    base = clone.head()
    clone.background()
    clone.commit(0.9, "too early")
    assert "\tkeep\ttoo early, 9 steps" in clone.run()
    assert [row[0] for row in clone.rows()[1:4]] == [base] * 3


def test_a_check_that_is_interrupted_and_a_second_one(clone):
    clone.edit(1.0, "if seed == 101: raise ValueError('nan')")
    clone.sh("git switch -q -c autoresearch/t && git commit -qam start")
    base = baseline(clone)
    assert clone.run(CHECK) == "idea: nothing was kept, so there is nothing to check\n"
    clone.commit(0.9, "better", "time.sleep(seed >= 100)")
    process = subprocess.Popen(["bash", "-c", CHECK], cwd=clone.folder, env=clone.env, start_new_session=True)
    clone.wait(lambda: len(clone.starts(clone.head())) == 2)  # the idea first
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert clone.run().startswith("idea: head ") and clone.rows()[-1][4] == "check, seed 100, 9 steps"
    assert clone.idea(1.2, "between")[3] == "discard"
    assert f"baseline {base}, 2 of 3 fresh seeds: 1.001000 (0.999 to 1.003)\n" in clone.run(CHECK)
    assert [row[5] for row in clone.rows()[-5:]] == ["100", "101", "101", "102", "102"]
    clone.idea(0.8, "better still")
    assert f"branch {clone.head()}, 3 of 3 fresh seeds" in clone.run(CHECK)
    assert [row[5] for row in clone.rows()[-6:]] == ["103", "103", "104", "104", "105", "105"]
    # A veto is possible after a check. What is then the head was checked before
    rows = len(clone.rows())
    assert clone.sh(DISCARD).startswith("idea: head 0.903000, ") and clone.run(CHECK).count("3 fresh seeds") == 2
    assert len(clone.rows()) == rows and "tried/" in clone.sh("git tag --points-at HEAD@{1}")


def test_settings_and_locale_change_nothing(clone):
    baseline(clone)
    for key in ("log.showSignature true", "color.ui always", "commit.encoding ISO-8859-1", "core.abbrev 12"):
        clone.sh(f"git config {key}")
    for env in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        clone.commit(1.2, "größer 0.4→0.3 🚀")
        clone.run(**env)
        assert clone.rows()[-1][4] == "größer 0.4→0.3 🚀, 9 steps"


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash p"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(PAGE.splitlines()) <= 112
