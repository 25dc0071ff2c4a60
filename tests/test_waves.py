"""program.md's waves, its commands run as they stand, by a real Slurm and as plain processes, through every fault.

Runs are a stand-in that prints what its second line says; the real train.py makes one wave of its own.
"""

import os
import re
import signal
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from slurm import MISSING, Slurm
from test_program import SEVERAL_GPUS, Clone, command

SETUP, LOOK, RECORD, COMBINE, CHECK, CLEAN = (
    command(words, page=SEVERAL_GPUS)
    for words in ("worktree add", "squeue", "grep -vxFf", "cherry-pick", "for i in 4 5 6", "worktree remove")
)
START = {True: command("sbatch", page=SEVERAL_GPUS), False: command("nohup", page=SEVERAL_GPUS)}

NOISE = [0.003, 0, -0.001, 0.002, 0.001, -0.003, -0.002, 0]  # of seeds 0 to 7; others by their last digit
STAND_IN = f"""
VALUE = 1.0
#
MORE = 0
#
FAULT = ""
import os, subprocess, time
where, began = os.environ.get("SLURMD_NODENAME", "here") + ":" + os.environ["CUDA_VISIBLE_DEVICES"], time.time()
print("pid:", os.getpid(), flush=True)
time.sleep(0.5)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:7]
seed = int(os.environ["SEED"])
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
print(f"---\\nval_bpb:          {{value:.6f}}\\nseed:             {{seed}}")
print(f"row:              {{commit}}\\t{{value:.6f}}\\t0.5")
"""
HANG = "while not os.path.exists('../go') and time.time() < began + 120: time.sleep(0.1)"  # till the test says go


class Night(Clone):
    """An agent without memory: it does what the look says is next."""

    def __init__(self, folder, gpus, slurm=None, train=STAND_IN, cache="/nowhere"):
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
        self.sh(SETUP.replace("seq K", f"seq {gpus}"))
        self.all = range(1, gpus + 1)
        self.base, self.commits = self.head(), {self.head()}

    def head(self, i=None):
        return self.sh(f"git -C {f'.waves/{i}' if i else '.'} rev-parse HEAD")[:7]

    def log(self, i):
        return (self.folder / f".waves/{i}.log").read_text()

    def look(self, seconds=0):
        """({worktree: its state}, what is next)"""
        text = self.sh(LOOK.replace("+ 45", f"+ {seconds}").replace("sleep(5)", "sleep(0.3)"))
        text = text.split("\ncommit\t")[0]
        assert sum("Next: " in line for line in text.splitlines()) == 1, text
        states = {int(i): rest for i, rest in re.findall(r"^(\d+) [0-9a-f]{7} (.*)$", text, re.M)}
        return states, re.search(r"Next: (.*)", text)[1]

    def start(self):
        return self.sh(START[bool(self.slurm)], ok=False)

    def idea(self, i, value, fault="", what=None, name="VALUE"):
        path = self.folder / f".waves/{i}/train.py"
        text = re.sub(f"^{name} = .*", f"{name} = {value}", path.read_text(), flags=re.M)
        path.write_text(re.sub("^FAULT = .*", f"FAULT = {fault!r}", text, flags=re.M))
        self.sh(f"git -C .waves/{i} commit -qam '{what or f'idea {i}'}'")
        self.commits.add(self.head(i))

    def baselines(self):
        """Wave 1 without its runs."""
        rows = [f"{self.base}\t{1 + NOISE[i - 1]:.6f}\t0.5\tkeep\twave 1: baseline, seed {i - 1}\n" for i in self.all]
        with open(self.folder / "results.tsv", "a") as table:
            table.writelines(rows)
        for i in self.all:
            (self.folder / f".waves/{i}.log").write_text("seed: 0\n")

    def pid(self, i):
        return int(re.findall("^pid: (.*)", self.log(i), re.M)[-1])

    def until(self, what, seconds=90):
        """Look and start until the look says this; returns the states."""
        deadline = time.monotonic() + seconds
        while True:
            states, following = self.look()
            if following.startswith(what):
                return states
            assert following in ("start", "look"), (states, following)
            assert time.monotonic() < deadline, (states, [self.log(i) for i in self.all])
            if following == "start":
                self.start()
            time.sleep(0.3)

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.look()
            time.sleep(0.1)

    def wave(self, record=True):
        states = self.until("record")
        self.logs = {i: self.log(i) for i in self.all}
        if record:
            self.sh(RECORD)
            self.consistent()
        return states

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
        assert {self.head(i) for i in self.all} == {self.head()}

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
    states, following = night.look()
    assert following == "start" and all(state.startswith("has not run") for state in states.values())
    night.start()
    night.start()  # a second time it starts nothing
    assert night.look() == ({i: f"runs or is queued: wave 1: baseline, seed {i - 1}" for i in night.all}, "look")
    night.until("record")
    ran = [re.search(r"ran: (\S+) (\S+) (\S+)", night.log(i)).groups() for i in night.all]
    assert {where for where, *_ in ran} == {"n1:0", "n1:1", "n2:0", "n2:1"}
    runs = sorted((where, float(began), float(ended)) for where, began, ended in ran)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(runs))  # never two on one GPU
    assert all(night.log(i).count("commit: ") == 1 for i in night.all)
    night.wave()
    assert night.statuses(1) == [("keep", f"{1 + noise:.6f}") for noise in NOISE]

    # Wave 2: the bar is of the head's mean, 1, and of the noise; three are below it
    assert night.look()[1] == "ideas"
    for i, value in zip(night.all, [1.2, 0.95, BAR + 2e-6, 0.96, BAR - 2e-6, 1.0, 0.9, 0.999], strict=True):
        night.idea(i, f"{value - NOISE[0] - (i in (2, 4)):.6f}", name="MORE" if i in (2, 4) else "VALUE")
    others = [f"tried/{night.head(i)}" for i in (2, 4, 5)]
    night.wave(record=False)
    assert night.look()[1] == f"record, and of the next ideas one is {' '.join(others)} together"
    night.sh(RECORD)
    night.consistent()
    assert [status for status, _ in night.statuses(2)] == ["discard"] * 6 + ["keep", "discard"]

    # Wave 3: one of the others on top of it (two are a conflict); and simpler code that costs little
    assert "CONFLICT" in night.sh(COMBINE.replace("tried/COMMIT tried/COMMIT", " ".join(others)), ok=False)
    night.sh("git -C .waves/1 restore --staged --worktree train.py")
    night.sh(COMBINE.replace("tried/COMMIT tried/COMMIT", others[0]))
    assert night.look() == ({i: "has its row" + " (edited since)" * (i == 1) for i in night.all}, "ideas")
    night.sh("git -C .waves/1 commit -qam both")
    night.commits.add(night.head(1))
    night.idea(2, 0.899, what="wave 3: simpler: less code")
    night.wave()
    assert night.statuses(3) == [("keep", "0.847000"), ("discard", "0.902000")]

    # The check: baseline and branch on three fresh seeds, the branch stays. Wave 4: simpler code is kept
    before = night.head()
    night.sh(CHECK)
    night.wave()
    checks = [(row[0], row[1], row[3], row[4]) for row in night.rows() if row[4].startswith("check")]
    values = [(before, 0.844), (night.base, 1.0)]
    assert sorted(checks) == sorted(
        (c, f"{value + NOISE[s % 10]:.6f}", "keep", f"check, seed {s}") for c, value in values for s in (100, 101, 102)
    )
    night.idea(1, 0.898, what="simpler: less code")
    night.wave()
    assert night.statuses(4) == [("keep", "0.848000")] and night.head() != before

    # The end: only branch, tags and table are left, and a commit that has no row
    night.idea(8, 0.5)
    assert f"{night.head(8)} has no row" in night.sh(CLEAN)
    assert night.sh("git worktree list --porcelain").count("worktree ") == 2
    assert night.sh("git status --porcelain") == ""


def jobs(night):
    """{worktree: Slurm's name of its job}"""
    return dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %F_%K'").splitlines())


def test_every_fault_through_slurm(tmp_path, slurm):
    night = Night(tmp_path, 8, slurm)
    night.baselines()
    once = "while open(f'{os.getcwd()}.log').read().count('commit: ') < 2: time.sleep(0.1)"
    void = "if open(f'{os.getcwd()}.log').read().count('commit: ') < 2: commit = '-------'"
    faults = {1: void, 2: "raise SystemExit('no memory')", 3: "VALUE = float('nan')", 5: once, 7: once}
    for i in night.all:
        night.idea(i, 0.7 + i / 100, faults.get(i, HANG if i in (4, 6, 8) else ""))
    assert night.look()[1] == "start"
    night.start()
    night.wait(lambda: {"4", "5", "6", "7"} <= set(jobs(night)))
    states, following = night.look()
    assert following == "start" and states[8] == "runs or is queued: wave 2: idea 8"
    assert states[1].startswith("was cut off or is void") and "exit: 0" in night.log(1)
    assert states[2] == "ended, 0: wave 2: idea 2" and "no memory" in night.log(2)
    # Slurm counts in minutes and looks every 30 seconds
    slurm.run("scontrol", "update", f"jobid={jobs(night)['4']}", "EndTime=now+1")
    slurm.run("scancel", jobs(night)["5"])
    os.kill(night.pid(6), signal.SIGKILL)
    wrapper = night.sh(f"ps -o ppid= {night.pid(7)}")
    os.kill(int(wrapper), signal.SIGKILL)
    night.wait(lambda: {1, 5, 7} == {i for i, state in night.look()[0].items() if state.startswith("was cut off")})
    assert night.log(5).count("CANCELLED AT") == 1
    night.start()
    for attempt in (1, 2):
        night.wait(lambda: "8" in jobs(night) and night.log(8).count("pid: ") == attempt)  # noqa: B023
        slurm.run("scancel", jobs(night)["8"])
        night.wait(lambda: "runs" not in night.look()[0][8])
        assert night.look()[0][8].startswith(["", "was cut off", "ended, 0"][attempt])
        night.start() if attempt == 1 else None
    night.wave()
    assert "DUE TO TIME LIMIT" in night.logs[4] and "exit: 137" in night.logs[6]


def test_a_node_goes_away_and_the_controller_restarts(tmp_path, slurm):
    night = Night(tmp_path, 6, slurm)
    night.baselines()
    for i in night.all:
        night.idea(i, 0.7 + i / 100, HANG)
    night.look()
    night.start()
    night.wait(lambda: len(jobs(night)) == 4)
    nodes = dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %N'").splitlines())
    gone = {int(i) for i, node in nodes.items() if node == "n2"}
    night.wait(lambda: all("pid: " in night.log(i) for i in gone))
    # A node loses power: its daemon, and all that it ran
    slurm.stop("n2")
    slurm.kill_jobs("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    night.wait(lambda: {i for i, state in night.look()[0].items() if state.startswith("was cut off")} == gone)
    night.start()
    assert night.look()[1] == "look"
    # The controller stops and comes back; the runs go on, and nobody takes them for cut off
    slurm.stop("slurmctld", signal.SIGTERM)
    assert night.look() == ({}, "look") and (night.folder / ".waves/start").read_text() == ""
    (night.folder / ".waves/go").touch()
    night.wait(lambda: "exit: 0" in night.log(min(set(night.all) - gone)))
    slurm.start("slurmctld")
    slurm.wait_for(lambda: "slurmctld is UP" not in slurm.run("squeue", ok=False), "slurmctld")
    night.wave()
    assert {i: night.logs[i].count("commit: ") for i in night.all} == {i: 1 + (i in gone) for i in night.all}
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 5
    slurm.start("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    slurm.ready()


def test_a_wave_is_picked_up_wherever_it_was_left(tmp_path, slurm):
    """Every command dies half-way once; what follows is what the look says."""
    night = Night(tmp_path, 2, slurm)
    night.look()
    night.sh("mv .waves/start .waves/started")  # and no sbatch
    assert night.look()[1] == "start"
    night.wave()
    assert night.look()[1] == "start"  # two baselines tell little: wave 2 has two more
    night.wave()
    rows = [row[4] for row in night.rows()[1:]]
    assert rows == [f"wave {1 + seed // 2}: baseline, seed {seed}" for seed in range(4)]
    for i, value in ((1, 0.8), (2, 0.9)):
        night.idea(i, value)
    slurm.run("scontrol", "update", "partitionname=all", "state=down")
    night.look()
    night.start()
    slurm.run("scancel", "--name=wave", "--state=PENDING")  # before it ran
    assert night.look()[1] == "start"
    slurm.run("scontrol", "update", "partitionname=all", "state=up")
    night.wave(record=False)
    # RECORD dies after each of its steps
    steps = ["|| true\n", "done\n", "\n      echo", "; mv .waves"]
    assert all(RECORD.count(step) == 1 for step in steps)
    for step in steps:
        half = RECORD[: RECORD.index(step)] + {"done\n": "done)", "\n      echo": "; exit; done)"}.get(step, ")")
        night.sh(half, ok=False)
        states, following = night.look()
        assert following in ("record", "ideas"), (states, following)
    night.sh(RECORD, ok=False)
    night.consistent()
    assert night.statuses(3) == [("keep", "0.803000"), ("discard", "0.903000")] and night.look()[1] == "ideas"


def test_waves_without_slurm(tmp_path):
    night = Night(tmp_path, 4)
    night.wave()
    for i in night.all:
        night.idea(i, 0.7 + i / 100, {1: "", 2: HANG, 3: HANG, 4: "1 / 0"}[i])
    night.look()
    night.start()
    night.wait(lambda: all("pid: " in night.log(i) for i in night.all) and "exit: " in night.log(1))
    ran = {i: re.search(r"ran: here:(\d)", night.log(i)) for i in night.all}
    assert ran[1][1] == "0"
    states, following = night.look()
    assert following == "look" and {i for i in night.all if states[i].startswith("runs")} == {2, 3}
    # The machine goes down: wrapper and run
    for pid in (int(night.sh(f"ps -o ppid= {night.pid(2)}")), night.pid(2)):
        os.kill(pid, signal.SIGKILL)
    # The wrapper alone: the run goes on, and nobody starts a second one
    os.kill(int(night.sh(f"ps -o ppid= {night.pid(3)}")), signal.SIGKILL)
    night.wait(lambda: night.look()[0][2].startswith("was cut off"))
    assert night.look()[0][3].startswith("runs")
    night.start()
    (night.folder / ".waves/go").touch()
    night.wave()
    assert {i: night.logs[i].count("commit: ") for i in night.all} == {1: 1, 2: 2, 3: 2, 4: 1}
    assert [status for status, _ in night.statuses(2)] == ["keep", "discard", "discard", "crash"]
    assert re.search(r"ran: here:(\d)", night.logs[2])[1] == "1"


def test_the_real_train_py(tmp_path, slurm, cache):
    night = Night(tmp_path, 2, slurm, train=None, cache=cache)
    night.env["OMP_NUM_THREADS"] = "1"  # two threads each on two cores wait for one another, beyond the budget
    night.wave()
    rows = night.rows()[1:]
    assert [row[3:] for row in rows] == [["keep", f"wave 1: baseline, seed {seed}"] for seed in (0, 1)], night.logs
    assert rows[0][1] != rows[1][1] and all(0.1 < float(row[1]) < 4 for row in rows)
