"""program.md's waves, its commands run as they stand, by a real Slurm and as plain processes, through every fault.

Runs are a stand-in that prints what its second line says; the real train.py makes one wave of its own.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from slurm import MISSING, Slurm
from test_program import SEVERAL_GPUS, Clone, command

WORKTREES, SCRIPTS, COMBINE, CHECK, CLEAN = (
    command(words, page=SEVERAL_GPUS)
    for words in ("worktree add", "grep -vxFf", "cherry-pick", "sed -n 2p", "worktree remove")
)
DECIDE, RECORD = (re.search(rf"`([^`]* \.waves/{name})`", SEVERAL_GPUS)[1] for name in (r"decide\.py", "record"))
START = {True: command("sbatch", page=SEVERAL_GPUS), False: command("nohup", page=SEVERAL_GPUS)}
WAIT = {True: command("squeue", page=SEVERAL_GPUS), False: command("ps -A", page=SEVERAL_GPUS)}

NOISE = [0.003, 0, -0.001, 0.002, 0.001, -0.003, -0.002, 0]  # of seeds 0 to 7; others by their last digit
STAND_IN = f"""
VALUE = 1.0
#
MORE = 0
#
FAULT = ""
import os, subprocess, time
where, began = os.environ.get("SLURMD_NODENAME", "here") + ":" + os.environ["CUDA_VISIBLE_DEVICES"], time.time()
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:7]
seed = int(os.environ["SEED"])
starts = open(f"../{{commit}}-{{seed}}.log").read().count("start: ")
print("pid:", os.getpid(), flush=True)
time.sleep(0.5)
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
print(f"---\\nval_bpb:          {{value:.6f}}\\nseed:             {{seed}}")
print(f"row:              {{commit}}\\t{{value:.6f}}\\t0.5")
"""
HANG_ONCE = "while starts < 2: time.sleep(0.1)"
# till the test says go; its log ends within a line
HANG = """print("step", end="", flush=True)
while not os.path.exists("../go") and time.time() < began + 120: time.sleep(0.1)"""
DIE_AT_EXIT = "import atexit; atexit.register(lambda: (print(end='', flush=True), os.kill(os.getpid(), 9)))"


class Night(Clone):
    """An agent without memory: it does what the page and the last command say."""

    def __init__(self, folder, gpus, slurm=None, train=STAND_IN, cache="/nowhere", limit=100):
        super().__init__(folder / "clone", cache)
        self.slurm = slurm
        if slurm:
            self.env |= {"SLURM_CONF": slurm.env["SLURM_CONF"]}
        (self.folder / ".venv").mkdir()
        for path in Path(sys.prefix).iterdir():
            (self.folder / ".venv" / path.name).symlink_to(path)
        if train:
            (self.folder / "train.py").write_text(train)
            self.sh("git commit -qam 'a stand-in'")
        self.sh("git switch -q -c autoresearch/t")
        self.sh(command("commit\\tval_bpb"))
        assert WORKTREES.count(" 600 ") == 1
        self.sh(WORKTREES.replace("seq K", f"seq {gpus}").replace(" 600 ", f" {limit} "))
        self.sh(SCRIPTS)
        self.all = range(1, gpus + 1)
        self.base, self.commits = self.head(), {self.head()}

    def head(self, i=None):
        return self.sh(f"git -C {f'.waves/{i}' if i else '.'} rev-parse HEAD")[:7]

    def log(self, i, seed=0):
        """What the run of this worktree's commit printed, '' before its start"""
        path = self.folder / f".waves/{self.head(i)}-{seed}.log"
        return path.read_text() if path.exists() else ""

    def start(self, seeds="", last=None):
        text = START[bool(self.slurm)].replace("K", str(last or len(self.all)), 1)
        assert text.count("/run") == 1
        self.sh(text.replace("/run", f"/run {seeds}"))

    def alive(self):
        """What runs or is queued, as the command lists it"""
        text = re.sub(r"sleep \d+", "sleep 0.1", WAIT[bool(self.slurm)]).replace("seq 45", "seq 3")
        return self.sh(text, ok=False).splitlines()[bool(self.slurm) :]

    def decide(self):
        """(what it printed, whether there is a decision)"""
        done = subprocess.run(["bash", "-c", DECIDE], cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr, done.returncode == 0

    def missing(self):
        """The commits of the runs that have no result yet, as the decision names them"""
        found = re.fullmatch(r"not ended: (.*)\. Wait \(step 3\)\. If nothing runs, start .*\n", self.decide()[0])
        return sorted(run[:7] for run in found[1].split()) if found else []

    def heads(self, *numbers):
        return sorted(self.head(i) for i in numbers)

    def idea(self, i, value, fault="", what=None, name="VALUE"):
        path = self.folder / f".waves/{i}/train.py"
        text = re.sub(f"^{name} = .*", f"{name} = {value}", path.read_text(), flags=re.M)
        path.write_text(re.sub("^FAULT = .*", lambda _: f"FAULT = {fault!r}", text, flags=re.M))
        self.sh(f"git -C .waves/{i} commit -qam '{what or f'idea {i}'}'")
        self.commits.add(self.head(i))

    def baselines(self):
        """Wave 1 without its runs."""
        rows = [
            f"{self.base}\t{1 + NOISE[(i - 1) % 8]:.6f}\t0.5\tkeep\twave 1: baseline, seed {i - 1}\n" for i in self.all
        ]
        with open(self.folder / "results.tsv", "a") as table:
            table.writelines(rows)

    def pid(self, i):
        return int(re.findall("^pid: (.*)", self.log(i), re.M)[-1])

    def parent(self, pid):
        return int(self.sh(f"ps -o ppid= {pid}"))

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.alive(), self.decide(), [self.log(i) for i in self.all])
            time.sleep(0.1)

    def finish(self, seeds="", last=None):
        """Steps 2 to 4, until there is a decision; returns what it prints."""
        for _ in range(4):
            self.start(seeds, last)
            self.wait(lambda: not self.alive(), 90)
            printed, decided = self.decide()
            if decided:
                return printed
            assert "not ended: " in printed
        raise AssertionError(printed)

    def record(self):
        self.sh(RECORD)
        self.consistent()

    def wave(self, seeds="", last=None):
        self.finish(seeds, last)
        self.record()

    def consistent(self):
        """Every commit of the waves has one row, the baseline one a seed; tags, branch and tree are as on one GPU."""
        rows = self.rows()
        assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
        assert all(len(row) == 5 for row in rows)
        ideas = [row for row in rows[1:] if not re.search("baseline, seed|^check", row[4])]
        assert Counter(row[0] for row in ideas) == Counter(self.commits - {self.base})
        assert len({(row[0], row[4]) for row in rows}) == len(rows)
        kept = [row[0] for row in ideas if row[3] == "keep"]
        assert self.sh(f"git log --reverse --format=%h {self.base}..").split() == kept
        assert self.sh("git branch --show-current") == "autoresearch/t\n"
        assert {tag[6:] for tag in self.sh("git tag").split()} == {row[0] for row in ideas if row[3] != "keep"}
        assert self.sh("git status --porcelain") == ""
        assert set(self.heads(*self.all)) == {self.head()}
        assert not list(self.folder.glob(".waves/*.row"))

    def statuses(self, wave):
        return [(row[3], row[1]) for row in self.rows() if row[4].startswith(f"wave {wave}: ")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if MISSING:
        pytest.skip(f"not installed: {' '.join(MISSING)} (apt-get install slurm-wlm munge)")
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(cluster):
    yield cluster
    cluster.run("scancel", "--me", ok=False)  # what a failed test left does not hold the next one's GPUs


BAR = 1 - 1.75 * statistics.stdev(NOISE)


def test_waves_of_eight_through_slurm(tmp_path, slurm):
    night = Night(tmp_path, 8, slurm)
    # Wave 1: the noise. Two nodes with two GPUs each, so half of the runs wait in the queue
    assert night.missing() == [night.base] * 8
    night.start("0 1 2 3 4 5 6 7")
    assert len(night.alive()) == 8
    night.wait(lambda: not night.alive())
    ran = [re.search(r"ran: (\S+) (\S+) (\S+)", night.log(i, i - 1)).groups() for i in night.all]
    assert {where for where, *_ in ran} == {"n1:0", "n1:1", "n2:0", "n2:1"}
    runs = sorted((where, float(began), float(ended)) for where, began, ended in ran)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(runs))  # never two on one GPU
    night.wave("0 1 2 3 4 5 6 7")  # starting again starts nothing
    assert all(night.log(i, i - 1).count("start: ") == 1 for i in night.all)
    assert night.statuses(1) == [("keep", f"{1 + noise:.6f}") for noise in sorted(NOISE)]

    # Wave 2: the bar is of the head's mean, 1, and of the noise; three are below it
    assert "no new run" in night.decide()[0]
    for i, value in zip(night.all, [1.2, 0.95, BAR + 2e-6, 0.96, BAR - 2e-6, 1.0, 0.9, 0.999], strict=True):
        night.idea(i, f"{value - NOISE[0] - (i in (2, 4)):.6f}", name="MORE" if i in (2, 4) else "VALUE")
    others = [f"tried/{night.head(i)}" for i in (2, 4, 5)]
    printed = night.finish()
    assert f"head 1.000000, margin {1 - BAR:.6f}: keep the best below {BAR:.6f}, " in printed
    assert printed.endswith(f"one of the next ideas, on the new head: {' '.join(others)}\n")
    night.record()
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 7

    # Wave 3: one of the others on top of it (two are a conflict); and simpler code that costs little
    assert "CONFLICT" in night.sh(COMBINE.replace("tried/COMMIT tried/COMMIT", " ".join(others)), ok=False)
    night.sh("git -C .waves/1 restore --staged --worktree train.py")
    night.sh(COMBINE.replace("tried/COMMIT tried/COMMIT", others[0]))
    night.sh("git -C .waves/1 commit -qam both")
    night.commits.add(night.head(1))
    night.idea(2, 0.899, what="simpler: less code")
    assert "one of the next" in night.finish()  # both passed
    night.record()
    assert night.statuses(3) == [("keep", "0.847000"), ("discard", "0.902000")]

    # The check: baseline and branch on three fresh seeds, the branch stays. Wave 4: simpler code is kept
    before = night.head()
    night.sh(CHECK)
    night.wave("100 101 102 100 101 102", 6)
    checks = [(row[0], row[1], row[3], row[4]) for row in night.rows() if row[4].startswith("check")]
    values = [(before, 0.844), (night.base, 1.0)]
    assert sorted(checks) == sorted(
        (c, f"{value + NOISE[s % 10]:.6f}", "keep", f"check, seed {s}") for c, value in values for s in (100, 101, 102)
    )
    night.idea(1, 0.901, what="worse")
    night.idea(2, 0.898, what="simpler: less code")
    night.wave()
    assert night.statuses(4) == [("keep", "0.848000"), ("discard", "0.851000")] and night.head() != before
    assert "head 0.847000, " in night.decide()[0]  # simpler code does not raise the bar

    # The end: only branch, tags and table are left, and a commit that has no row
    night.idea(8, 0.5)
    assert ".waves/8/: no row" in night.sh(CLEAN)
    assert night.sh("git worktree list --porcelain").count("worktree ") == 2
    assert night.sh("git status --porcelain") == ""
    # Another night from the same commit: it runs again
    night.sh(f"git worktree remove .waves/8; git switch -q -c autoresearch/u {night.base}")
    night.sh(command("commit\\tval_bpb"))
    night.sh(WORKTREES.replace("seq K", "seq 2"))
    night.sh(SCRIPTS)
    night.finish("0 1", 2)
    night.sh(RECORD)
    assert night.statuses(1) == [("keep", "1.000000"), ("keep", "1.003000")]


def jobs(night):
    """{worktree: Slurm's name of its job}"""
    return dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %F_%K'").splitlines())


def test_every_fault_through_slurm(tmp_path, slurm):
    night = Night(tmp_path, 8, slurm, limit=8)
    night.baselines()
    faults = {
        1: "commit = '-------'",
        2: "raise SystemExit('no memory')",
        3: "VALUE = float('nan')",
        4: "time.sleep(99)",
        5: HANG,
        6: HANG,
        7: HANG_ONCE,
    }
    for i in night.all:
        night.idea(i, 0.7 + i / 100, faults.get(i, ""))
    night.start()
    queued = dict(line.split() for line in night.sh("squeue -hr -t PD -o '%K %F_%K'").splitlines())
    slurm.run("scancel", queued["8"])
    # Cancelled; killed itself; its job script killed
    night.wait(lambda: all("pid: " in night.log(i) for i in (5, 6, 7)))
    slurm.run("scancel", jobs(night)["5"])
    os.kill(night.pid(6), signal.SIGKILL)
    os.kill(night.parent(night.parent(night.pid(7))), signal.SIGKILL)
    night.wait(lambda: not night.alive())
    assert night.missing() == night.heads(5, 6, 7, 8)
    # Cut off a second time
    night.start()
    for i in (5, 6):
        night.wait(lambda: night.log(i).count("pid: ") == 2)  # noqa: B023
        os.kill(night.pid(i), signal.SIGKILL)
    # A run that exceeded its time, or whose train.py was edited after the commit, has no number. The slip is mended
    slip = night.head(1)
    assert f"{slip}\t0.000000\t0.0\tcrash\twave 2: idea 1\n" in night.finish()
    night.idea(1, 0.71)
    night.sh("git -C .waves/1 reset -q --soft HEAD~2 && git -C .waves/1 commit -qm 'idea 1, mended'")
    night.commits = {night.base, slip, *night.heads(*night.all)}
    assert f"{night.head(1)}\t0.713000\t0.5\tkeep\twave 2: idea 1, mended\n" in night.finish()
    logs = {i: night.log(i) for i in night.all}
    night.record()
    assert "no memory" in logs[2]
    expected = {"slip": 0, 1: 0.713, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0.773, 8: 0.783}
    assert sorted(night.statuses(2)) == sorted(
        ("crash" if not value else "keep" if value == 0.713 else "discard", f"{value:.6f}")
        for value in expected.values()
    )
    assert {i: logs[i].count("pid: ") for i in night.all} == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 1}


def test_a_node_goes_away_and_the_controller_restarts(tmp_path, slurm):
    night = Night(tmp_path, 6, slurm)
    night.baselines()
    for i in night.all:
        night.idea(i, 0.7 + i / 100, HANG)
    night.start()
    night.wait(lambda: len(jobs(night)) == 4)
    nodes = dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %N'").splitlines())
    gone = {int(i) for i, node in nodes.items() if node == "n2"}
    night.wait(lambda: all("pid: " in night.log(i) for i in gone))
    # A node loses power: its daemon, and all that it ran
    slurm.stop("n2")
    slurm.kill_jobs("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    night.wait(lambda: len(night.alive()) == 4)
    # The controller stops and comes back; the runs go on
    slurm.stop("slurmctld", signal.SIGTERM)
    assert "Unable to contact slurm controller" in night.sh(f"sleep() {{ :; }}; exec 2>&1; {WAIT[True]}", ok=False)
    assert night.missing() == night.heads(*night.all)
    (night.folder / ".waves/go").touch()
    left = min(set(night.all) - gone)
    night.wait((night.folder / f".waves/{night.head(left)}-0.row").exists)
    slurm.start("slurmctld")
    slurm.wait_for(lambda: "slurmctld is UP" not in slurm.run("squeue", ok=False), "slurmctld")
    night.wait(lambda: not night.alive(), 90)
    assert night.missing() == night.heads(*gone)
    night.finish()
    logs = {i: night.log(i) for i in night.all}
    night.record()
    assert {i: logs[i].count("start: ") for i in night.all} == {i: 1 + (i in gone) for i in night.all}
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 5
    slurm.start("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    slurm.ready()


def test_the_time_limit_of_slurm(tmp_path, slurm):
    """That of the job, should it be shorter than the script's own. Slurm looks at it every 30 seconds."""
    night = Night(tmp_path, 2, slurm)
    night.baselines()
    night.idea(1, 0.7, HANG)  # there is no second idea, so the second task ends at once
    night.start()
    night.wait(lambda: "pid: " in night.log(1))
    slurm.run("scontrol", "update", f"jobid={jobs(night)['1']}", "EndTime=now+1")
    night.wait(lambda: not night.alive(), 90)
    assert "DUE TO TIME LIMIT" in (night.folder / ".waves/slurm.log").read_text()
    assert night.missing() == [night.head(1)]
    (night.folder / ".waves/go").touch()
    night.finish()
    assert night.log(1).count("start: ") == 2
    night.record()
    assert night.statuses(2) == [("keep", "0.703000")]


def test_a_wave_is_picked_up_wherever_it_was_left(tmp_path, slurm):
    """Every step is left half-way once; what follows is what the page says: wait, decide, and do what this says."""
    night = Night(tmp_path, 2, slurm)
    night.wave("0 1")
    # Two baselines tell little, so wave 2 has two more. One of them is cut off
    night.finish("2 3")
    (night.folder / f".waves/{night.base}-3.row").unlink()
    assert night.decide() == (
        f"not ended: {night.base}-3. Wait (step 3). If nothing runs, start again (step 2)\n",
        False,
    )
    night.wave("2 3")
    assert [night.log(1, seed).count("start: ") for seed in range(4)] == [1, 1, 1, 2]
    rows = [row[4] for row in night.rows()[1:]]
    assert sorted(rows) == [f"wave {1 + seed // 2}: baseline, seed {seed}" for seed in range(4)]
    # One of two ideas has a commit: the other worktree's run has ended long ago, it is the baseline's
    night.idea(1, 0.8)
    night.start()
    night.wait(lambda: not night.alive())
    assert night.head(1) in night.decide()[0] and night.log(2).count("start: ") == 1
    night.idea(2, 0.9)
    assert night.missing() == [night.head(2)]
    night.sh(RECORD)  # too early: nothing happens
    assert night.head(2) != night.head() == night.base and len(night.rows()) == 5
    night.finish()
    # The record dies before its first command, its second, and so on
    table, record = ((night.folder / name).read_text() for name in ("results.tsv", ".waves/record"))
    for n in range(1, 99):
        done = night.sh(f"set -T; trap '((++commands < {n})) || kill -9 $$' DEBUG\n{record}\necho done", ok=False)
        if "done" in done:
            break
        half_way = (night.folder / ".waves/rows").exists()
        printed, decided = night.decide()
        if (night.folder / "results.tsv").read_text() == table:
            assert decided and "\tkeep\twave 3: idea 1\n" in printed
        elif half_way:
            assert printed == "step 5 was cut off: do it again\n"
    assert n > 15
    night.consistent()
    assert night.statuses(3) == [("keep", "0.803000"), ("discard", "0.903000")]
    assert "no new run" in night.decide()[0]
    night.record()


def test_waves_without_slurm(tmp_path):
    night = Night(tmp_path, 4)
    night.wave("0 1 2 3")
    for i in night.all:
        night.idea(i, 0.7 + i / 100, {1: DIE_AT_EXIT, 2: HANG, 3: HANG, 4: "1 / 0"}[i])
    night.start()
    ended = [night.folder / f".waves/{night.head(i)}-0.row" for i in (1, 4)]
    night.wait(lambda: all("pid: " in night.log(i) for i in night.all) and all(row.exists() for row in ended))
    assert re.search(r"ran: here:(\d)", night.log(1))[1] == "0"
    assert len({line.split(".waves/")[1] for line in night.alive() if line.endswith("train.py")}) == 2
    # The machine goes down: a run, its time limit and its script
    pid = night.pid(2)
    for one in (night.parent(night.parent(pid)), night.parent(pid), pid):
        os.kill(one, signal.SIGKILL)
    # The script alone: the run goes on, and is waited for
    os.kill(night.parent(night.parent(night.pid(3))), signal.SIGKILL)
    night.wait(lambda: not any("/2/train.py" in line for line in night.alive()))
    assert any("/3/train.py" in line for line in night.alive())
    assert night.missing() == night.heads(2, 3)
    (night.folder / ".waves/go").touch()
    night.wait(lambda: not night.alive())
    assert night.missing() == night.heads(2, 3)
    night.finish()
    logs = {i: night.log(i) for i in night.all}
    night.record()
    assert {i: logs[i].count("start: ") for i in night.all} == {1: 1, 2: 2, 3: 2, 4: 1}
    assert [status for status, _ in night.statuses(2)] == ["crash", "keep", "discard", "discard"]
    assert re.search(r"ran: here:(\d)", logs[2])[1] == "1"


def test_slips_of_the_agent(tmp_path):
    night = Night(tmp_path, 2)
    (night.folder / ".waves/notes").mkdir()  # not a worktree: git in it is the clone's own
    night.start()  # the baseline without seeds: nothing runs
    night.wait(lambda: not night.alive())
    assert night.missing() == [night.base] * 2 and not night.log(1)
    night.wave("0 1")
    night.wave("2 3")
    night.idea(1, 0.8, what="check whether\ttabs do harm")
    night.idea(2, 0.6)
    night.start("0 1")  # ideas with seeds: nothing runs
    night.wait(lambda: not night.alive())
    assert night.missing() == night.heads(1, 2) and not night.log(1)
    night.start()
    night.start()  # while it runs
    night.finish()
    assert [night.log(i).count("start: ") for i in night.all] == [1, 1]
    # A commit that was replaced after its run is not kept, though it was the best
    replaced = night.head(2)
    night.idea(2, 0.9)
    night.sh("git -C .waves/2 reset -q --soft HEAD~2 && git -C .waves/2 commit -qm 'idea 2'")
    night.commits = {night.base, replaced, *night.heads(1, 2)}
    night.finish()
    # Git refuses to move the branch over an edit: the record stops, and can be done again
    (night.folder / "train.py").write_text("an edit")
    night.sh("git config tag.gpgsign true")
    assert night.sh(f"{RECORD}; echo $?") == "1\n"
    assert night.decide() == ("step 5 was cut off: do it again\n", False)
    night.sh("git restore train.py")
    night.record()
    assert [[row[1], *row[3:]] for row in night.rows()[-3:]] == [
        ["0.603000", "discard", "wave 3: idea 2"],
        ["0.803000", "keep", "wave 3: check whether tabs do harm"],
        ["0.903000", "discard", "wave 3: idea 2"],
    ]
    night.sh(f"git -C .waves/1 switch -q --detach {night.base}")  # not the branch's head
    night.idea(1, 0.7)
    night.start()
    night.wait(lambda: not night.alive())
    assert night.missing() == night.heads(1) and not night.log(1)
    assert f"1 {night.head(1)}: seeds are" in (night.folder / ".waves/nohup.log").read_text()


def test_the_margin_of_wide_waves(tmp_path):
    for gpus, margin in ((31, 1.75), (32, 2.5)):
        (tmp_path / str(gpus)).mkdir()
        night = Night(tmp_path / str(gpus), gpus)
        night.baselines()
        values = [1 + NOISE[i % 8] for i in range(gpus)]
        assert f", margin {margin * statistics.stdev(values):.6f}: " in night.decide()[0]


def test_baselines_that_crash(tmp_path):
    crash = "if not os.path.exists('../go'): raise SystemExit(1)"
    night = Night(tmp_path, 2, train=STAND_IN.replace('FAULT = ""', f"FAULT = {crash!r}"))
    assert night.finish("0 1").count("\tcrash\t") == 2
    (night.folder / ".waves/go").touch()
    night.sh(f"mv .waves/{night.base}-0.* .waves/.old")
    assert night.finish("0 1").count("\tcrash\t") == 1
    night.record()
    night.idea(1, 0.5)
    night.start()
    night.wait(lambda: not night.alive())
    assert night.decide() == ("fewer than two baselines have a number: there is no bar\n", False)


def test_the_real_train_py(tmp_path, slurm, cache):
    night = Night(tmp_path, 2, slurm, train=None, cache=cache)
    night.env["OMP_NUM_THREADS"] = "1"  # two threads each on two cores wait for one another, beyond the budget
    night.wave("0 1")
    rows = sorted(night.rows()[1:], key=lambda row: row[4])
    assert [row[3] for row in rows] == ["keep"] * 2, rows
    for seed, row in enumerate(rows):
        assert re.fullmatch(rf"wave 1: baseline, seed {seed}, [1-9]\d* steps", row[4])
        assert re.findall("^num_steps: *(.*)", night.log(1, seed), re.M) == [row[4].split()[-2]]
    assert rows[0][1] != rows[1][1] and all(0.1 < float(row[1]) < 4 for row in rows)
    same = re.search(r"`(grep -hE [^`]*)`", SEVERAL_GPUS)[1]
    assert [line.split(":")[0] for line in night.sh(same).splitlines()] == ["attention", "harness"]
