"""program.md's waves, its commands run as they stand, by a real Slurm and as plain processes, through every fault.

Runs are the stand-in of test_program.py, which says where and when it ran.
"""

import os
import re
import signal
import statistics
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from slurm import MISSING, Slurm
from test_program import CHECK, NOISE, RUN, SEVERAL_GPUS, Clone, command, lives, parent

import prepare

WORKTREES, SBATCH = (command(words, page=SEVERAL_GPUS) for words in ("worktree add", "sbatch"))
(CLEAN,) = re.findall(r"`(for w in [^`]*)`", SEVERAL_GPUS)
BAR = 1 - 1.5 * statistics.stdev(NOISE)
# till the test says go; its log ends within a line
HANG = """print("step", end="", flush=True)
while not os.path.exists("../go") and time.time() < began + 120: time.sleep(0.1)"""


class Night(Clone):
    """An agent without memory: it does what the page and the last command say."""

    def __init__(self, folder, gpus, cache, slurm=None):
        super().__init__(folder / "clone", cache)
        self.slurm = slurm
        if slurm:
            self.env |= {"SLURM_CONF": slurm.env["SLURM_CONF"]}
        self.env.pop("CUDA_VISIBLE_DEVICES", None)
        (self.folder / ".venv").mkdir()
        for path in Path(sys.prefix).iterdir():
            (self.folder / ".venv" / path.name).symlink_to(path)
        self.sh("git switch -q -c autoresearch/t")
        self.sh(WORKTREES.replace("seq K", f"seq {gpus}"))
        self.all = range(1, gpus + 1)
        self.base, self.commits = self.head(), {self.head()}

    def at(self, i):
        return self.head(f".waves/{i}")

    def log(self, i):
        path = self.folder / f".waves/{i}/run.log"
        return path.read_text() if path.exists() else ""

    def pid(self, i):
        return int(self.starts(self.at(i))[-1][2])

    def start(self, only=None, check=False):
        if self.slurm:
            numbers = ",".join(map(str, only or self.all))
            self.sh(SBATCH.replace("1-K", numbers).replace("run $", "run check $" if check else "run $"))
        else:
            self.sh(CHECK if check else RUN)

    def alive(self):
        """Whether a run or its supervisor is"""
        if self.slurm:
            return self.sh("squeue --me -rh", ok=False).splitlines()
        return [line for line in self.sh("ps -Awwo args=").splitlines() if f"{self.folder}/" in line]

    def decide(self, command="decide"):
        """What it printed at last, errors too"""
        return self.sh(f"uv run prepare.py {command} 2>&1", ok=False)

    def waiting(self):
        """What `decide` says is to be done, for which worktrees (the first three that it names), and how many"""
        printed = self.decide()
        named = [int(i) for i in re.findall(r"\.waves/(\d+): \w+ \w{7}, seed", printed)]
        return printed.split(":")[0], named, len(named) + int((re.findall(r"; and (\d+) more", printed) or [0])[0])

    def idea(self, i, value, fault="", what=None, name="VALUE"):
        self.edit(value, fault, f".waves/{i}", name)
        self.sh(f"git -C .waves/{i} commit -qam '{what or f'idea {i}'}'")
        self.commits.add(self.at(i))

    def baselines(self, monkeypatch):
        """Wave 1 without its runs. The working directory becomes the clone."""
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(prepare, "__file__", str(self.folder / "prepare.py"))
        more = dict(memory_gb="0.5", status="keep", kind="baseline", wave=1, machine=0.9, change=0.0)
        more |= dict(commit=self.base, harness="0123456789ab", prepared="", attention="sdpa")
        rows = [
            more | dict(number=i, seed=i, val_bpb=f"{1 + NOISE[i % 8]:.6f}", description=f"wave 1: baseline, seed {i}")
            for i in range(max(4, len(self.all)))
        ]
        prepare.write_rows(prepare.open_night(), rows)

    def wave(self, only=None, check=False, veto=""):
        """Run, decide, record; what `record` prints."""
        self.start(only, check)
        if check:  # also before the first of its jobs has begun
            assert self.decide("decide check").startswith(("wait: ", "record: "))
        self.wait(lambda: not self.alive())
        printed = self.decide(f"record {veto}")
        assert "\nrecorded: " in printed, (printed, [self.log(i) for i in self.all])
        self.consistent()
        return printed

    def consistent(self):
        """Every commit of the waves has one row, the baseline one a seed; tags, branch and trees are as on one GPU."""
        rows = self.rows()
        assert rows[0] == prepare.HEADER.split("\t")
        assert all(len(row) == 5 for row in rows)
        ideas = [row for row in rows[1:] if not re.search("(baseline|check), seed", row[4])]
        assert Counter(row[0] for row in ideas) == Counter(self.commits - {self.base})
        assert len({(row[0], row[4]) for row in rows}) == len(rows)
        kept = [row[0] for row in ideas if row[3] == "keep"]
        assert self.sh(f"git log --reverse --format=%h {self.base}..").split() == kept
        assert self.sh("git branch --show-current") == "autoresearch/t\n"
        assert {tag[6:] for tag in self.sh("git tag").split()} == {row[0] for row in ideas if row[3] != "keep"}
        assert self.sh("git status --porcelain") == ""
        assert {self.at(i) for i in self.all} == {self.head()}

    def statuses(self, wave):
        rows = [row for row in self.rows() if row[4].startswith(f"wave {wave}: ")]
        return [(row[3], row[1]) for row in sorted(rows, key=lambda row: float(row[1]))]


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


def test_waves_of_eight_through_slurm(tmp_path, slurm, session_cache):
    night = Night(tmp_path, 8, session_cache, slurm)
    # Wave 1: the noise. Two nodes with two GPUs each, so half of the runs wait in the queue
    assert night.waiting() == ("run", [1, 2, 3], 8)
    night.start()
    assert len(night.alive()) == 8
    night.wait(lambda: not night.alive())
    ran = [re.search(r"ran: (\S+) (\S+) (\S+)", night.log(i)).groups() for i in night.all]
    assert {where for where, *_ in ran} == {"n1:0", "n1:1", "n2:0", "n2:1"}
    runs = sorted((where, float(began), float(ended)) for where, began, ended in ran)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(runs))  # never two on one GPU
    night.decide("record")
    night.consistent()
    assert night.statuses(1) == [("keep", f"{1 + noise:.6f}") for noise in sorted(NOISE)]

    # Wave 2: the bar is of the head's mean, 1, and of the noise; four are below it
    for i, value in zip(night.all, [1.2, 0.95, BAR + 2e-6, 0.96, BAR - 2e-6, 1.0, 0.9, 0.999], strict=True):
        night.idea(i, f"{value - NOISE[0] - (i in (2, 4)):.6f}", name="MORE" if i in (2, 4) else "VALUE")
    others = [f"tried/{night.at(i)}" for i in (2, 4, 5)]
    printed = night.wave()
    assert f"head 1.000000, margin {1 - BAR:.6f}, n 0: keep below {BAR:.6f}, " in printed
    assert f"\none of the next ideas, on the new head: {' '.join(others)}\n" in printed
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 7

    # Wave 3: one of the others on top of it; and simpler code that costs little. The other worktrees have no idea
    night.sh(f"git -C .waves/1 cherry-pick -n {others[0]} && git -C .waves/1 commit -qm both")
    night.commits.add(night.at(1))
    night.idea(2, 0.899, what="simpler: less code")
    assert "one of the next" in night.wave([1, 2])  # both passed
    assert night.statuses(3) == [("keep", "0.847000"), ("discard", "0.902000")]

    # Wave 4, the check: baseline and branch on three fresh seeds. Wave 5: simpler code is kept
    before = night.head()
    night.wave(check=True)
    checks = [(row[0], row[1], row[3], row[4]) for row in night.rows() if ": check" in row[4]]
    assert sorted(checks) == sorted(
        (commit, f"{value + NOISE[s % 10]:.6f}", "keep", f"wave 4: check, seed {s}, 9 steps")
        for commit, value in [(before, 0.844), (night.base, 1.0)]
        for s in (100, 101, 102)
    )
    night.idea(1, 0.901, what="worse")
    night.idea(2, 0.898, what="simpler: less code")
    night.wave()  # six jobs have nothing to do
    assert night.statuses(5) == [("keep", "0.848000"), ("discard", "0.851000")] and night.head() != before
    assert "head 0.847000, " in night.decide()  # simpler code does not raise the bar

    # The end: only branch, tags and table are left
    night.sh(CLEAN)
    assert night.sh("git worktree list --porcelain").count("worktree ") == 1
    assert night.sh("git status --porcelain") == ""


def jobs(night):
    """{worktree: Slurm's name of its job}"""
    return dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %F_%K'").splitlines())


def test_every_fault_through_slurm(tmp_path, slurm, session_cache, monkeypatch):
    night = Night(tmp_path, 8, session_cache, slurm)
    night.baselines(monkeypatch)
    faults = {
        1: "report['problems'] = ['too late']",
        2: "raise SystemExit('no memory')",
        3: "raise ValueError('the loss is nan')",
        4: "print('x' * 10**7); raise SystemExit('y' * 10**7)",
    }
    faults |= dict.fromkeys((5, 6, 7), HANG)
    for i in night.all:
        night.idea(i, 0.7 + i / 100, faults.get(i, ""))
    night.start()
    queued = dict(line.split() for line in night.sh("squeue -hr -t PD -o '%K %F_%K'").splitlines())
    slurm.run("scancel", queued["8"])
    # Cancelled while it runs; its supervisor killed; killed itself, as by a lack of memory: that is a crash
    night.wait(lambda: all(night.starts(night.at(i)) for i in (5, 6, 7)))
    slurm.run("scancel", jobs(night)["5"])
    os.kill(parent(night.pid(6)), signal.SIGKILL)
    os.kill(night.pid(7), signal.SIGKILL)
    night.wait(lambda: not lives(night.pid(5)))  # else it may end by itself
    (night.folder / ".waves/go").touch()
    night.wait(lambda: not night.alive())
    other = night.sh("cd / && sbatch --parsable --hold --output=/dev/null --wrap true").strip()
    assert night.waiting() == ("run", [5, 6, 8], 3)  # a job of another folder is not waited for
    slurm.run("scancel", other)
    night.start([5, 6, 8])
    night.wait(lambda: not night.alive())
    # A run that exceeded its time has no number. The slip is mended
    assert f"{night.at(1)}\t0.000000\t0.0\tcrash\twave 2: idea 1: too late" in night.decide()
    night.idea(1, 0.71)
    night.sh("git -C .waves/1 reset -q --soft HEAD~2 && git -C .waves/1 commit -qm 'idea 1, mended'")
    night.commits = {night.base, *(night.at(i) for i in night.all)}
    assert night.waiting() == ("run", [1], 1)
    commits = {i: night.at(i) for i in night.all}
    assert f"{night.at(1)}\t0.713000\t0.5\tkeep\twave 2: idea 1, mended" in night.wave()
    values = {1: 0.713, 2: 0, 3: 0, 4: 0, 5: 0.753, 6: 0.763, 7: 0, 8: 0.783}
    kinds = {0: "crash", 0.713: "keep"}
    expected = [(kinds.get(value, "discard"), f"{value:.6f}") for value in values.values()]
    assert sorted(night.statuses(2)) == sorted(expected)
    assert {i: len(night.starts(commits[i])) for i in night.all} == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 1, 8: 1}


def test_a_node_goes_away_and_the_controller_restarts(tmp_path, slurm, session_cache, monkeypatch):
    night = Night(tmp_path, 6, session_cache, slurm)
    night.baselines(monkeypatch)
    for i in night.all:
        night.idea(i, 0.7 + i / 100, HANG)
    night.start()
    night.wait(lambda: len(jobs(night)) == 4)
    assert night.waiting() == ("wait", [1, 2, 3], 6)  # two of them in the queue
    nodes = dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %N'").splitlines())
    gone = sorted(int(i) for i, node in nodes.items() if node == "n2")
    night.wait(lambda: all(night.starts(night.at(i)) for i in gone))
    # A node loses power: its daemon, and all that it ran
    slurm.stop("n2")
    slurm.kill_jobs("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    night.wait(lambda: len(night.alive()) == 4)
    # The controller stops and comes back; the runs go on
    slurm.stop("slurmctld", signal.SIGTERM)
    word, named, number = night.waiting()  # nobody knows the queue now
    assert word == "run" and {*gone} <= {*named, 6} and number == 4
    (night.folder / ".waves/go").touch()
    night.wait(lambda: "ran: " in night.log(min(set(night.all) - set(gone))))
    slurm.start("slurmctld")
    slurm.wait_for(lambda: "slurmctld is UP" not in slurm.run("squeue", ok=False), "slurmctld")
    night.wait(lambda: not night.alive())
    assert night.waiting() == ("run", gone, 2)
    commits = {i: night.at(i) for i in night.all}
    night.wave(gone)
    assert {i: len(night.starts(commits[i])) for i in night.all} == {i: 1 + (i in gone) for i in night.all}
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 5
    slurm.start("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    slurm.ready()


def test_a_record_that_dies_anywhere_goes_on(tmp_path, session_cache, monkeypatch):
    night = Night(tmp_path, 3, session_cache)
    night.baselines(monkeypatch)
    for i, value in zip(night.all, (0.8, 0.9, 1.2)):
        night.idea(i, value)
    night.start()
    night.wait(lambda: not night.alive())
    for name, value in night.env.items():
        monkeypatch.setenv(name, value)
    calls, plain = [0], prepare.git

    def dying(*arguments, **options):
        calls[0] -= 1
        if calls[0] == 0:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(prepare, "git", dying)
    for n in range(1, 99):
        calls[0] = n
        try:
            prepare.night_command("record")
        except KeyboardInterrupt:
            continue
        break
    assert n > 8
    night.consistent()
    assert night.statuses(2) == [("keep", "0.803000"), ("discard", "0.903000"), ("discard", "1.203000")]


def test_waves_without_slurm(tmp_path, session_cache):
    night = Night(tmp_path, 4, session_cache)
    night.wave()
    assert [row[4].split(",")[:2] for row in night.rows()[1:]] == [["wave 1: baseline", f" seed {i}"] for i in range(4)]
    for i in night.all:
        night.idea(i, 0.7 + i / 100, {2: HANG, 3: HANG, 4: "1 / 0"}.get(i, ""))
    night.start()
    night.wait(lambda: all(night.starts(night.at(i)) for i in night.all))
    night.wait(lambda: "ran: here:0 " in night.log(1))
    assert "it is going on or has ended" in night.sh(f"{RUN} 2>&1", ok=False)
    # The machine goes down: a run and its supervisor
    os.kill(parent(night.pid(2)), signal.SIGKILL)
    assert night.waiting() == ("run", [2], 1)
    (night.folder / ".waves/go").touch()
    night.wait(lambda: not night.alive())
    assert night.waiting() == ("run", [2], 1)
    commits = {i: night.at(i) for i in night.all}
    night.wave(veto=f"discard {commits[1]}")  # it costs more than the human allows, so the next best is kept
    assert [len(night.starts(commits[i])) for i in (2, 3)] == [2, 1]
    assert [status for status, _ in night.statuses(2)] == ["crash", "discard", "keep", "discard"]
    assert "wave 2: idea 4: ZeroDivisionError: division by zero" in (night.folder / "results.tsv").read_text()


def test_slips_of_the_agent(tmp_path, session_cache):
    night = Night(tmp_path, 2, session_cache)
    night.idea(2, 0.6)  # before the baseline: it waits
    for _ in range(2):
        night.start()
        night.wait(lambda: not night.alive())
        night.decide("record")
    assert [row[4][:24] for row in night.rows()[1:]] == [f"wave {1 + i // 2}: baseline, seed {i}" for i in range(4)]
    # An idea of two commits
    night.idea(1, 0.9)
    night.idea(1, 0.8)
    for printed in (night.sh(f"{RUN} 2>&1", ok=False), night.decide("record")):
        assert f"(in .waves/1) must be one commit on top of {night.base}" in printed
    night.sh("git -C .waves/1 reset -q --soft HEAD~2 && git -C .waves/1 commit -qm 'check whether\ttabs do harm'")
    night.commits = {night.base, night.at(1), night.at(2)}
    night.start()
    night.wait(lambda: not night.alive())
    # An edit that has no commit stays
    night.edit(-0.3, "", ".waves/1", "MORE")
    night.sh("cd .waves/1 && uv run prepare.py record")  # as from the clone
    assert "+MORE = -0.3" in night.sh("git -C .waves/1 diff")
    night.sh("git -C .waves/1 restore train.py")
    night.consistent()
    assert [[row[1], *row[3:]] for row in night.rows()[-2:]] == [
        ["0.803000", "discard", "wave 3: check whether tabs do harm, 9 steps"],
        ["0.603000", "keep", "wave 3: idea 2, 9 steps"],
    ]
    # An idea in the clone
    night.edit(0.5)
    night.sh("git commit -qam 'in the wrong place'")
    assert "is an idea in the clone" in night.decide("record")
    night.sh("git reset -q --hard HEAD~1")
    # The same idea in two worktrees runs once
    night.idea(1, 0.55)
    night.sh("git -C .waves/2 switch -q --detach $(git -C .waves/1 rev-parse HEAD)")
    night.wave()
    # A check without a number
    night.sh(CHECK)
    night.wait(lambda: not night.alive())
    run = night.folder / ".waves/1/run.json"
    run.write_text(re.sub('"problems": \\[', '"problems": ["too late"', run.read_text()))
    assert "\tcrash\twave 5: check, seed 100: too late\n" in night.decide("record")
