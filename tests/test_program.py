"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

Runs are a stand-in; test_sandbox.py has the real train.py. uv is one too: a scratch clone would install everything.
"""

import copy
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
from conftest import ROOT, wait_until

import prepare

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(words):
    """The one command of program.md, without its section on several GPUs, that has these words."""
    (found,) = (text for text in blocks(ONE_GPU) if words in text)
    return found


RUN = command("run prepare.py run\n").strip()
(BRANCH,) = re.findall(r"`(git switch -c [^`]*)`", ONE_GPU)
CHECK, DISCARD = re.findall(r"`(uv run prepare.py (?:run check|discard))`", ONE_GPU)[::-1]
LOOK = command("tail -n 35")
SHAPE = "an idea is one commit on top of"

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
CONSTANTS = {"^WAIT = 45": "WAIT = 5", "^PAUSE, BEAT = 10, 3": "PAUSE, BEAT = 1, 1"}
CONSTANTS |= {r"time\.sleep\(0\.5\)": "time.sleep(0.1)"}  # between two looks of a waiting `run`
# like uv: one process more, which passes SIGTERM on
UV = f"""#!/bin/bash
shift; [ "$1" = python ] && shift
"{sys.executable}" "$@" & trap "kill $!" TERM; wait $!; status=$?; wait $! 2>/dev/null; exit $status
"""


class Clone:
    """A scratch repository in which an agent with no memory types commands."""

    def __init__(self, folder, cache, grace=540):
        self.folder = folder / "clone"
        self.folder.mkdir()
        for name in ("prepare.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, self.folder)
        for old, new in (CONSTANTS | {"^GRACE = 540": f"GRACE = {grace}"}).items():
            self.replace(old, new, file="prepare.py")
        (self.folder / "train.py").write_text(STAND_IN)
        (folder / "bin").mkdir()
        (folder / "bin/uv").write_text(UV)
        (folder / "bin/uv").chmod(0o755)
        self.env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.env |= {"AUTORESEARCH_CACHE": str(cache), "GIT_CONFIG_GLOBAL": os.devnull, "STARTS": f"{folder}/starts"}
        self.env.pop("CUDA_VISIBLE_DEVICES", None)
        self.sh("git init -q -b main && git config user.name agent && git config user.email a@example.org")
        self.sh("git add -A && git commit -qm start")

    def copy(self, folder):
        other = copy.copy(self)
        other.folder = shutil.copytree(self.folder, folder / "clone")
        other.env = self.env | {"STARTS": f"{folder}/starts"}
        other.sh("git status")  # git finds other inodes, and looks into the files once
        return other

    def sh(self, text, ok=True, **env):
        command, options = ["bash", "-c", text], dict(cwd=self.folder, env=self.env | env, timeout=120)
        done = subprocess.run(command, capture_output=True, **options)
        printed = done.stdout.decode(errors="replace")
        assert not ok or done.returncode == 0, (text, printed, done.stderr)
        return printed

    def replace(self, pattern, text, file):
        found, count = re.subn(pattern, lambda _: text, (self.folder / file).read_text(encoding="utf-8"), flags=re.M)
        assert count == 1, pattern
        (self.folder / file).write_text(found, encoding="utf-8")

    def edit(self, value, fault="", tree=".", name="VALUE"):
        self.replace(f"^{name} = .*", f"{name} = {value}", f"{tree}/train.py")
        self.replace("^FAULT = .*", f"FAULT = {fault!r}", f"{tree}/train.py")

    def commit(self, value, what, fault="", name="VALUE"):
        """The commit of an idea"""
        self.edit(value, fault, name=name)
        self.sh(command("git commit -qm").replace("WHAT CHANGES", what))
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

    def background(self, command=RUN, begun=lambda self: self.starts(self.head())):
        """A command that ends without a word when what it was to begin has begun"""
        process = subprocess.Popen(["bash", "-c", command], cwd=self.folder, env=self.env, start_new_session=True)
        wait_until(lambda: begun(self))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def mend(self, why, what="mended"):
        """Do what an error says"""
        printed = self.run()
        assert why in printed, printed
        self.sh(" && ".join(re.findall("`(git -C [^`]*)`", printed)).replace("WHAT", what))

    def head(self, tree="."):
        return self.sh(f"git -C {tree} rev-parse HEAD")[:7]

    def pid(self, tree="."):
        """Of the last run of its commit"""
        return int(self.starts(self.head(tree))[-1][2])

    def starts(self, commit):
        """[[commit, seed, pid] of each start]"""
        path = Path(self.env["STARTS"])
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split() for line in lines if line.startswith(commit)]

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()[1:]]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


def lives(pid):
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def clone(tmp_path, session_cache):
    return Clone(tmp_path, session_cache, grace=4)


@pytest.fixture(scope="module")
def first_night(tmp_path_factory, session_cache):
    clone = Clone(tmp_path_factory.mktemp("night"), session_cache, grace=4)
    clone.sh("git switch -q -c autoresearch/t")
    clone.commit(1.0, "start", "if seed == 101: raise ValueError('nan')")
    assert clone.run().startswith("idea: head ")
    return clone


@pytest.fixture
def night(first_night, tmp_path):
    """A clone whose baseline has run"""
    return first_night.copy(tmp_path)


def test_a_night_in_small(clone):
    (clone.folder / "results.tsv").write_text("an earlier night")
    assert re.fullmatch("agent <a@example.org> .*\n", clone.sh(command("GIT_AUTHOR_IDENT")))
    clone.sh(BRANCH)
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}-\d{4}", branch)
    assert "results.tsv is no table of this prepare.py" in clone.run()
    clone.sh("mv results.tsv results-before.tsv")

    # The noise: three seeds in one call
    base, printed = clone.head(), clone.sh(RUN)
    assert [row[:1] + row[3:7] for row in clone.rows()] == [
        [base, "keep", f"baseline, seed {seed}, 9 steps", str(seed), str(seed + 1)] for seed in range(3)
    ]
    scores = [float(row[1]) for row in clone.rows()]
    head, margin = statistics.mean(scores), 1.5 * statistics.stdev(scores)
    assert printed.startswith(f"idea: head {head:.6f}, margin {margin:.6f}, n 0: ") and clone.run() == printed

    # Kept; discarded
    kept, *row = clone.idea(0.9, "batch 2^9")
    assert row[:4] == ["0.903000", "0.5", "keep", "batch 2^9, 9 steps"] and clone.head() == kept
    (clone.folder / "README.md").write_text("the human's own, not committed")
    row = clone.idea(0.95, "checkpoint\tactivations")
    assert row[3:5] == ["discard", "checkpoint activations, 9 steps"] and clone.head() == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    clone.sh("git restore README.md")
    assert ", n 1: " in clone.run()

    # Crashes: with a line that is too long to show, with noise after it; time exceeded; killed; never ended; a hang
    for what, fault, why in (
        ("odd", "print('x' * 10**6); import atexit; atexit.register(print, 'leaked'); 1 / 0", "ZeroDivisionError: div"),
        ("late", "report['problems'] = ['training took 9 s']", "training took 9 s"),
        ("killed", "os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL: step 1"),
        ("cut off", "os.kill(os.getppid(), 9); time.sleep(9)", "its supervisor was ended 3 times"),
        ("hang", "time.sleep(500)", "hang: no end after 6 s"),
    ):
        row = clone.idea(0.8, what, fault)
        assert row[1:4] == ["0.000000", "0.0", "crash"] and row[4].startswith(f"{what}: {why}")
        assert clone.head() == kept and len(clone.sh(LOOK)) < 7000
        assert len(clone.starts(row[0])) == (3 if what == "cut off" else 1)
    assert 'run.py", line ' in clone.sh("cat run.log")  # where it hung
    # A slip is mended: a row of its own
    clone.sh(f"git cherry-pick -n tried/{row[0]}")
    clone.commit(0.95, "mended")
    clone.run()
    row = clone.idea(0.95, "late end", "import atexit; atexit.register(time.sleep, 500)")
    assert row[3:5] == ["discard", "late end, 9 steps, did not end by itself"]
    # One that would be kept, but for the human's limits
    row = clone.idea(0.6, "simpler: batch 2^8")
    assert row[3] == "keep" and f"\n{row[0]}\t0.603000\t0.5\tdiscard\tsimpler" in clone.sh(DISCARD)
    assert clone.head() == kept and "only a keep of the last wave" in clone.run(DISCARD)

    # The check finds commits and seeds, three each, and moves no bar
    before, printed = clone.run().splitlines()[0], clone.run(CHECK)
    assert printed.splitlines() == [
        "idea: the check is complete",
        f"baseline {base}, 3 of 3 fresh seeds: {1 + statistics.mean(NOISE[:3]):.6f} (0.999 to 1.003)",
        f"branch {kept}, 3 of 3 fresh seeds: {0.9 + statistics.mean(NOISE[:3]):.6f} (0.899 to 0.903)",
    ]
    assert clone.run(CHECK) == printed and clone.run().splitlines()[0] == before
    pairs = [[commit, str(seed)] for seed in (100, 101, 102) for commit in (kept, base)]
    assert [[row[0], row[5]] for row in clone.rows()[-6:]] == pairs

    # After the night
    rows, titles = clone.rows(), clone.sh("head -n 1 results.tsv").split()
    assert titles == list(prepare.Row._fields) and {(len(row), row[8]) for row in rows} == {(10, branch)}
    assert "".join(row[3][0] for row in rows) == "kkkkdcccccdddkkkkkk"
    assert clone.sh("git status --porcelain -uno") == "" and clone.sh("git ls-files results.tsv run.*") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, base]
    assert {*clone.sh("git tag").split()} == {f"tried/{row[0]}" for row in rows if row[3] != "keep"}
    # A second night in the same table
    clone.sh("git switch -q -c autoresearch/second")
    assert "head 0.900667, " in clone.run() and [row[0] for row in clone.rows()[-3:]] == [kept] * 3
    # On no branch of a night nothing is done
    clone.sh("git switch -q main")
    assert all("this is main: git switch to it" in clone.run(words) for words in (RUN, DISCARD))


def test_a_run_lives_as_long_as_its_supervisor(night):
    """And a cache named from where the command was typed is found."""
    night.env["AUTORESEARCH_CACHE"] = os.path.relpath(night.env["AUTORESEARCH_CACHE"], night.folder)
    commit = night.commit(0.9, "slow to end", "time.sleep(1)")
    night.background()
    supervisor = parent(night.pid())
    os.kill(supervisor, signal.SIGSTOP)
    assert night.sh(f"{RUN} --wait 6").startswith("wait: ") and not lives(night.pid())  # longer than its limit
    os.kill(supervisor, signal.SIGCONT)
    assert f"\n{commit}\t0.903000\t0.5\tkeep" in night.run() and len(night.starts(commit)) == 1
    # What was cut off starts again, and nothing of it lives on
    commit = night.commit(0.8, "slow", "time.sleep(3); subprocess.Popen(['sleep', '99'])")
    night.background()
    pid = night.pid()
    os.kill(parent(pid), signal.SIGKILL)
    wait_until(lambda: not lives(pid))
    assert night.sh(f"{RUN} --wait 1").startswith("wait: 1 of 1 runs, start 2: ")
    assert f"{commit}\t0.803000\t0.5\tkeep" in night.run() and len(night.starts(commit)) == 2


KILLER = """
import os, signal, sys
events = []
def deadly(event, arguments):
    events.extend([event] * (event in ("subprocess.Popen", "os.rename", "os.remove")))
    if len(events) >= int(os.environ["N"]):
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[0].endswith("prepare.py") and sys.argv[1] != "supervise" and "N" in os.environ:
    sys.addaudithook(deadly)
"""


@pytest.mark.parametrize("value", [0.9, 1.2])
def test_a_command_that_dies_anywhere_goes_on(night, tmp_path, value):
    """kill -9 before the n-th process that it starts or file that it replaces, for each n, in `run` and `discard`."""
    base = night.head()
    (tmp_path / "sitecustomize.py").write_text(KILLER)

    def survive(command, ends):
        for n in range(1, 90):
            printed = night.sh(f"{command} 2>&1", ok=False, N=str(n), PYTHONPATH=str(tmp_path))
            if re.match(ends, printed):
                return n
            assert "Killed" in printed or not printed, printed

    commit = night.commit(value, "idea", "time.sleep(1)")
    assert 12 < survive(f"{RUN} --wait 0", "wait: ") < 30  # it has been started
    night.edit(-0.3, "time.sleep(1)", name="MORE")
    wait_until(lambda: any(path.stat().st_size > 5 for path in night.folder.glob("run.*.end")))
    assert 12 < survive(RUN, "idea: ") < 60  # and is recorded
    assert night.run().startswith("idea: ") and len(night.starts(commit)) == 1
    assert [row[3] for row in night.rows() if row[0] == commit] == ["keep" if value < 1 else "discard"]
    if value < 1:
        assert night.head() == commit and "-0.3" in night.sh("git diff train.py")
        assert 12 < survive(DISCARD, "idea: |.*only a keep") < 60
    assert night.run().startswith("idea: ") and night.head() == base and night.rows()[-1][3] == "discard"
    assert night.sh("git tag") == f"tried/{commit}\n" and night.sh("git status --porcelain -uno") == ""
    (patch,) = night.folder.glob("edit-*.patch")
    assert "+MORE = -0.3" in patch.read_text()


def test_two_at_once_or_a_closed_terminal_start_one_run(night):
    for value in (1.2, 0.9):
        commit = night.commit(value, "two", "time.sleep(1)")
        printed = night.sh(f"({RUN} & {RUN} & wait) 2>/dev/null")
        assert printed.count("idea: head ") == 2 and len(night.starts(commit)) == 1
        assert [row[0] for row in night.rows()].count(commit) == 1
    assert night.head() == commit
    commit = night.commit(0.8, "twice", "time.sleep(2)")
    night.sh(f"timeout 1 script -qec 'bash --norc -ic \"{RUN}; exit\"' /dev/null", ok=False)  # it hangs up
    assert "\tkeep\ttwice, 9 steps" in night.run() and len(night.starts(commit)) == 1


def test_an_edit_without_a_commit_is_laid_aside_where_the_tree_moves(night):
    night.edit(0.8)
    assert "note: train.py has an edit without a commit: it did not run" in night.run()
    night.sh("git restore train.py")
    tried = night.commit(1.2, "worse", "time.sleep(1)")
    night.background()
    night.edit(-0.3, "time.sleep(1)", name="MORE")
    night.sh("printf '# no UTF-8: \\xff' >> train.py && git add train.py")
    printed = night.run()
    assert printed.startswith("idea: ") and night.rows()[-1][3] == "discard" and tried != night.head()
    assert night.sh("git status --porcelain -uno") == "" and night.run() == printed
    back, patch = re.search("laid aside: `(.*)` brings it back, then remove (.*)", printed).groups()
    night.sh(f"{back} && rm {patch}")
    assert "note: an edit" not in night.run()
    edit = subprocess.check_output(["git", "diff", "HEAD"], cwd=night.folder)
    assert re.findall(rb"^[+-]\w+ =.*", edit, re.M) == [b"-MORE = 0", b"+MORE = -0.3"] and b"\xff" in edit
    # A conflict that is open
    night.sh("git restore -SW train.py")
    assert night.idea(0.9, "better")[3] == "keep"
    night.sh(f"git cherry-pick -n tried/{tried}", ok=False)
    assert "<<<<<<<" in (night.folder / "train.py").read_text()
    assert night.sh(DISCARD).startswith("idea: head 1.00") and night.rows()[-1][3] == "discard"
    (patch,) = night.folder.glob("edit-*.patch")
    assert "+<<<<<<<" in patch.read_text() and night.sh("git status --porcelain -uno") == ""


def test_the_human_commits_in_the_night(night):
    page = "echo >> program.md && git commit -qam"
    night.idea(1.3, "first")
    night.sh(f"{page} before")
    night.commit(0.9, "under")
    night.sh(f"{page} after")
    night.run()
    assert night.rows()[-1][3:5] == ["keep", "under, 9 steps"] and night.sh("git log --format=%s -n 1") == "after\n"
    assert night.idea(1.2, "next")[3] == "discard" and night.sh("git log --format=%s -n 1") == "after\n"
    night.commit(1.2, "worse")
    night.sh(f"{page} above && echo mine >> README.md")
    assert night.run().startswith("idea: head 0.903000, ") and night.rows()[-1][3:5] == ["discard", "worse, 9 steps"]
    assert night.sh("git log --format=%s -n 3") == "above\nafter\nunder\n"
    assert night.sh("git status --short -uno") == " M README.md\n" and "mine" in night.sh("cat README.md")
    # During a run, as the agent's next idea: it is recorded before the shape of the branch is judged
    night.sh("git restore README.md")
    commit = night.commit(1.2, "runs", "time.sleep(1)")
    night.background()
    night.sh(f"{page} page")
    night.commit(-0.4, "too early", name="MORE")
    night.mend(SHAPE)
    assert night.rows()[-1][:1] + night.rows()[-1][3:5] == [commit, "discard", "runs, 9 steps"]
    assert night.run().startswith("idea: ") and night.rows()[-1][3:5] == ["keep", "too early, 9 steps"]
    assert night.sh("git log --format=%s -n 2") == "too early\npage\n" and len(night.starts(commit)) == 1
    # What was begun ends and has its row, though the agent has amended it
    first = night.commit(1.2, "begun", "time.sleep(1)")
    night.background()
    night.edit(1.3)
    night.sh("git commit -q --amend -am amended")
    assert night.run().startswith("idea: ") and night.rows()[-2][0] == first
    assert [row[4] for row in night.rows()[-2:]] == ["begun, 9 steps", "amended, 9 steps"]


def test_a_table_or_a_run_of_another_kind(night):
    night.idea(1.2, "worse")
    table, run = night.folder / "results.tsv", night.folder / "run.json"
    rows, facts = table.read_bytes(), json.loads(run.read_text())
    wrong = dict.fromkeys([b"", rows.decode().encode("utf-16"), b"commit\n"], "is no table of this prepare.py")
    for other, why in (wrong | {rows[:-60]: "has a damaged line", rows + b"\n": "has a damaged line"}).items():
        table.write_bytes(other)
        printed = night.run()
        assert f"results.tsv {why}" in printed and printed.count("\n") == 1
    table.write_bytes(rows)
    for other in (facts | {"row": facts["row"][:-1]}, {"row": 5}, [], {}):
        run.write_text(json.dumps(other))
        assert night.run().startswith("idea: head ")
    # A new table: the baseline is the head, not what ran last
    run.write_text(json.dumps(facts))
    table.unlink()
    assert night.run().startswith("idea: head 1.00") and {row[0] for row in night.rows()} == {night.head()}
    assert facts["row"][0] != night.head()


def test_what_is_refused_names_what_mends_it(night):
    base = night.head()
    commit = night.commit(0.9, "another cache", "report |= dict(harness='ba9876543210')")
    (night.folder / "git").symlink_to(shutil.which("git"))
    path = f"{night.env['PATH'].split(':')[0]}:{night.folder}"  # has no Slurm: the cache is not to blame
    assert re.search("'sbatch': fix that, run it again", night.run(f"PATH={path} {RUN} --sbatch --mem=1"))
    for starts in (1, 2):
        assert "the harness is ba9876543210, that of the baseline 0123456789ab: undo" in night.run()
        assert len(night.starts(commit)) == starts and len(night.rows()) == 3
    night.sh("git reset -q --hard HEAD~1 && echo >> README.md")
    night.edit(0.9)
    night.sh("git commit -qam 'another file too'")
    night.mend(SHAPE)
    assert night.sh("git diff --name-only HEAD") == "README.md\n"  # it is not lost
    night.sh("git restore -SW README.md")
    night.commit(0.8, "two commits")
    night.mend(SHAPE)
    assert night.run().startswith("idea: ") and night.rows()[-1][3:5] == ["keep", "mended, 9 steps"]
    night.sh("git reset -q --hard HEAD~1")
    night.commit(0.5, "from the wrong commit", name="MORE")
    night.mend(SHAPE)
    assert night.run().startswith("idea: ") and night.rows()[-1][1:4:2] == ["1.303000", "discard"]
    assert base in night.sh("git log --format=%h") and "invalid choice" in night.run(f"{RUN} twice")
    # A fault of the machine is not the idea's
    night.commit(0.5, "idea", "if not os.path.exists('go'): raise SystemExit('prepare.py: error: no GPU')")
    assert all("the idea has no number (prepare.py: error: no GPU)" in night.run() for _ in range(2))
    (night.folder / "go").touch()
    assert night.run().startswith("idea: ") and night.rows()[-1][3:5] == ["keep", "idea, 9 steps"]


def test_a_baseline_has_three_numbers_and_stays_where_it_was_begun(clone):
    clone.sh("git switch -q -c autoresearch/t")
    clone.commit(1.0, "a bad start", "1 / 0")
    for _ in range(2):
        assert "the baseline has no number (ZeroDivisionError" in clone.run()
    fault = "time.sleep(seed == 0); assert seed != 1 or os.path.exists('go')"
    base = clone.commit(1.0, "a good start", fault)
    clone.background()
    clone.commit(0.9, "too early")
    for _ in range(2):
        assert "the baseline has no number (AssertionError" in clone.run()
    (clone.folder / "go").touch()
    assert "\tkeep\ttoo early, 9 steps" in clone.run()
    assert [[row[0], row[3], row[5]] for row in clone.rows()[:-1]] == [[base, "keep", str(seed)] for seed in range(3)]


def test_a_check_that_is_interrupted_and_a_second_one(night):
    base = night.head()
    assert night.run(CHECK) == "idea: nothing was kept, so there is nothing to check\n"
    commit = night.commit(0.9, "better", "time.sleep(seed == 100)")
    night.background(CHECK, lambda night: len(night.starts(commit)) == 2)  # the idea first
    assert night.run().startswith("idea: head ") and night.rows()[-1][4] == "check, seed 100, 9 steps"
    assert night.idea(1.2, "between")[3] == "discard"
    assert f"baseline {base}, 2 of 3 fresh seeds: 1.001000 (0.999 to 1.003)\n" in night.run(CHECK)
    assert [row[5] for row in night.rows()[-5:]] == ["100", "101", "101", "102", "102"]
    night.idea(0.8, "better still")
    assert f"branch {night.head()}, 3 of 3 fresh seeds" in night.run(f"{RUN} --wait 5 check")
    assert [row[5] for row in night.rows()[-6:]] == ["103", "103", "104", "104", "105", "105"]
    # A veto is possible after a check. What is then the head was checked before
    rows = len(night.rows())
    assert night.sh(DISCARD).startswith("idea: head 0.903000, ") and night.run(CHECK).count("3 fresh seeds") == 2
    assert len(night.rows()) == rows and "tried/" in night.sh("git tag --points-at HEAD@{1}")


def test_settings_and_locale_change_nothing(night):
    for key in ("log.showSignature true", "color.ui always", "commit.encoding ISO-8859-1", "core.abbrev 12"):
        night.sh(f"git config {key}")
    for env in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        night.commit(1.2, "größer 0.4→0.3 🚀")
        night.run(**env)
        assert night.rows()[-1][4] == "größer 0.4→0.3 🚀, 9 steps"


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash p"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(PAGE.splitlines()) <= 112
