"""program.md's waves, its commands run as they stand, by a real Slurm and as plain processes, through every fault.

Runs are a stand-in that prints what its second line says. test_program.py runs the real train.py.
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

import prepare

WORKTREES, CHECK = (command(words, page=SEVERAL_GPUS) for words in ("worktree add", "sed -n 2p"))
START = {True: command("sbatch", page=SEVERAL_GPUS), False: command("nohup", page=SEVERAL_GPUS)}
(CLEAN,) = re.findall(r"`(for w in [^`]*)`", SEVERAL_GPUS)

NOISE = [0.003, 0, -0.001, 0.002, 0.001, -0.003, -0.002, 0]  # of seeds 0 to 7; others by their last digit
BAR = 1 - 1.5 * statistics.stdev(NOISE)
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
with open("../starts", "a") as starts:
    starts.write(f"{{commit}} {{seed}} {{os.getpid()}}\\n")
time.sleep(0.5)
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
print(f"---\\nval_bpb:          {{value:.6f}}\\nnum_steps:        9\\nseed:             {{seed}}")
print(f"row:              {{commit}}\\t{{value:.6f}}\\t0.5")
"""
# till the test says go; its log ends within a line
HANG = """print("step", end="", flush=True)
while not os.path.exists("../go") and time.time() < began + 120: time.sleep(0.1)"""


class Night(Clone):
    """An agent without memory: it does what the page and the last command say."""

    def __init__(self, folder, gpus, monkeypatch, slurm=None, train=STAND_IN):
        super().__init__(folder / "clone", "/nowhere")
        self.slurm = slurm
        if slurm:
            self.env |= {"SLURM_CONF": slurm.env["SLURM_CONF"]}
        (self.folder / ".venv").mkdir()
        for path in Path(sys.prefix).iterdir():
            (self.folder / ".venv" / path.name).symlink_to(path)
        (self.folder / "train.py").write_text(train)
        self.sh("git commit -qam 'a stand-in'")
        self.sh("git switch -q -c autoresearch/t")
        self.sh(WORKTREES.replace("seq K", f"seq {gpus}"))
        self.all = range(1, gpus + 1)
        self.base, self.commits = self.head(), {self.head()}
        for name, value in self.env.items():  # decide runs in this process: it needs seconds to start as one of its own
            if name.startswith("GIT_"):
                monkeypatch.setenv(name, value)
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(prepare, "DECIDE_WAIT", 0)

    def head(self, i=None):
        return self.sh(f"git -C {f'.waves/{i}' if i else '.'} rev-parse HEAD")[:7]

    def heads(self, *numbers):
        return sorted(self.head(i) for i in numbers)

    def log(self, i):
        path = self.folder / f".waves/{i}/run.log"
        return path.read_text() if path.exists() else ""

    def starts(self, commit=None):
        """[[commit, seed, pid] of each start]"""
        path = self.folder / ".waves/starts"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if commit in (None, line[0])]

    def pid(self, i):
        return int(self.starts(self.head(i))[-1][2])

    def start(self, seeds="", only=None):
        text = START[bool(self.slurm)].replace("/run", f"/run {seeds}", 1)
        numbers = only or list(self.all)
        text = text.replace("1-K", ",".join(map(str, numbers))).replace("$(seq K)", " ".join(map(str, numbers)))
        self.sh(text)

    def alive(self):
        if self.slurm:
            return self.sh('squeue --me -rhn "$(pwd -P)"', ok=False).splitlines()
        return [line for line in self.sh("ps -Awwo args=").splitlines() if f"{self.folder}/.waves" in line] or list(
            self.runs()
        )

    def runs(self):
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                if f"{self.folder}/.waves" in os.readlink(proc / "cwd"):
                    yield int(proc.name)
            except OSError:
                pass

    def decide(self, capsys, *command):
        """(what it printed, "" or the error)"""
        capsys.readouterr()
        try:
            prepare.decide(*command or ["decide"])
            return capsys.readouterr().out, ""
        except prepare.PrepareError as error:
            return capsys.readouterr().out, str(error)

    def waiting(self, capsys):
        printed, error = self.decide(capsys)
        assert not error
        return [int(i) for i in re.findall(r"\.waves/(\d+)", printed)] if printed.startswith("not ended: ") else []

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
        (self.folder / "results.tsv").write_text(prepare.HEADER + "\n" + "".join(rows))

    def wait(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.alive(), [self.log(i) for i in self.all])
            time.sleep(0.1)

    def wave(self, capsys, seeds="", only=None):
        """Run, decide, record; what `decide` prints."""
        self.start(seeds, only)
        self.wait(lambda: not self.alive())
        printed, error = self.decide(capsys, "record")
        assert not error, (error, [self.log(i) for i in self.all])
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
        assert set(self.heads(*self.all)) == {self.head()}

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


def test_waves_of_eight_through_slurm(tmp_path, slurm, monkeypatch, capsys):
    night = Night(tmp_path, 8, monkeypatch, slurm)
    # Wave 1: the noise. Two nodes with two GPUs each, so half of the runs wait in the queue
    assert night.waiting(capsys) == list(night.all)
    night.start("0 1 2 3 4 5 6 7")
    assert len(night.alive()) == 8
    night.wait(lambda: not night.alive())
    ran = [re.search(r"ran: (\S+) (\S+) (\S+)", night.log(i)).groups() for i in night.all]
    assert {where for where, *_ in ran} == {"n1:0", "n1:1", "n2:0", "n2:1"}
    runs = sorted((where, float(began), float(ended)) for where, began, ended in ran)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(runs))  # never two on one GPU
    night.decide(capsys, "record")
    night.consistent()
    assert night.statuses(1) == [("keep", f"{1 + noise:.6f}") for noise in sorted(NOISE)]

    # Wave 2: the bar is of the head's mean, 1, and of the noise; four are below it
    for i, value in zip(night.all, [1.2, 0.95, BAR + 2e-6, 0.96, BAR - 2e-6, 1.0, 0.9, 0.999], strict=True):
        night.idea(i, f"{value - NOISE[0] - (i in (2, 4)):.6f}", name="MORE" if i in (2, 4) else "VALUE")
    others = [f"tried/{night.head(i)}" for i in (2, 4, 5)]
    printed = night.wave(capsys)
    assert f"head 1.000000, margin {1 - BAR:.6f}, n 0: keep below {BAR:.6f}, " in printed
    assert f"\none of the next ideas, on the new head: {' '.join(others)}\n" in printed
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 7

    # Wave 3: one of the others on top of it; and simpler code that costs little. The other worktrees have no idea
    night.sh(f"git -C .waves/1 cherry-pick -n {others[0]} && git -C .waves/1 commit -qm both")
    night.commits.add(night.head(1))
    night.idea(2, 0.899, what="simpler: less code")
    assert "one of the next" in night.wave(capsys, only=[1, 2])  # both passed
    assert night.statuses(3) == [("keep", "0.847000"), ("discard", "0.902000")]

    # Waves 4 and 5, the check: baseline and branch on three fresh seeds, the branch stays. Wave 6: simpler code is kept
    before = night.head()
    night.sh(CHECK)
    night.wave(capsys, "100 101 102", [1, 2, 3])
    night.wave(capsys, "100 101 102", [1, 2, 3])
    checks = [(row[0], row[1], row[3], row[4]) for row in night.rows() if ": check" in row[4]]
    values = [(before, 0.844), (night.base, 1.0)]
    assert sorted(checks) == sorted(
        (c, f"{value + NOISE[s % 10]:.6f}", "keep", f"wave {wave}: check, seed {s}, 9 steps")
        for wave, (c, value) in zip((5, 4), values)
        for s in (100, 101, 102)
    )
    night.idea(1, 0.901, what="worse")
    night.idea(2, 0.898, what="simpler: less code")
    night.wave(capsys, only=[1, 2])
    assert night.statuses(6) == [("keep", "0.848000"), ("discard", "0.851000")] and night.head() != before
    assert "head 0.847000, " in night.decide(capsys)[0]  # simpler code does not raise the bar

    # The end: only branch, tags and table are left
    night.sh(CLEAN)
    assert night.sh("git worktree list --porcelain").count("worktree ") == 1
    assert night.sh("git status --porcelain") == ""


def jobs(night):
    """{worktree: Slurm's name of its job}"""
    return dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %F_%K'").splitlines())


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


def test_every_fault_through_slurm(tmp_path, slurm, monkeypatch, capsys):
    night = Night(tmp_path, 8, monkeypatch, slurm)
    night.baselines()
    faults = {
        1: "commit = '-------'",
        2: "raise SystemExit('no memory')",
        3: "VALUE = float('nan')",
        4: "print('x' * 10**7); raise SystemExit('y' * 10**7)",
    }
    faults |= dict.fromkeys((5, 6, 7), HANG)
    for i in night.all:
        night.idea(i, 0.7 + i / 100, faults.get(i, ""))
    night.start()
    queued = dict(line.split() for line in night.sh("squeue -hr -t PD -o '%K %F_%K'").splitlines())
    slurm.run("scancel", queued["8"])
    # Cancelled while it runs; its job script killed; killed itself, as by a lack of memory: that is a crash
    night.wait(lambda: all(night.starts(night.head(i)) for i in (5, 6, 7)))
    slurm.run("scancel", jobs(night)["5"])
    os.kill(parent(night.pid(6)), signal.SIGKILL)
    os.kill(night.pid(7), signal.SIGKILL)
    night.wait(lambda: not Path(f"/proc/{night.pid(5)}").exists())  # else it may end by itself
    (night.folder / ".waves/go").touch()
    night.wait(lambda: not night.alive())
    assert night.waiting(capsys) == [5, 6, 8]
    night.start(only=[5, 6, 8])
    night.wait(lambda: not night.alive())
    # A run that exceeded its time, or whose train.py was edited after the commit, has no number. The slip is mended
    assert f"{night.head(1)}\t0.000000\t0.0\tcrash\twave 2: idea 1: row: " in night.decide(capsys)[0]
    night.idea(1, 0.71)
    night.sh("git -C .waves/1 reset -q --soft HEAD~2 && git -C .waves/1 commit -qm 'idea 1, mended'")
    night.commits = {night.base, *night.heads(*night.all)}
    assert night.waiting(capsys) == [1]
    commits = {i: night.head(i) for i in night.all}
    assert f"{night.head(1)}\t0.713000\t0.5\tkeep\twave 2: idea 1, mended" in night.wave(capsys, only=[1])
    values = {1: 0.713, 2: 0, 3: 0, 4: 0, 5: 0.753, 6: 0.763, 7: 0, 8: 0.783}
    kinds = {0: "crash", 0.713: "keep"}
    expected = [(kinds.get(value, "discard"), f"{value:.6f}") for value in values.values()]
    assert sorted(night.statuses(2)) == sorted(expected)
    assert {i: len(night.starts(commits[i])) for i in night.all} == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 1, 8: 1}


def test_a_node_goes_away_and_the_controller_restarts(tmp_path, slurm, monkeypatch, capsys):
    night = Night(tmp_path, 6, monkeypatch, slurm)
    night.baselines()
    for i in night.all:
        night.idea(i, 0.7 + i / 100, HANG)
    night.start()
    night.wait(lambda: len(jobs(night)) == 4)
    nodes = dict(line.split() for line in night.sh("squeue -hr -t R -o '%K %N'").splitlines())
    gone = sorted(int(i) for i, node in nodes.items() if node == "n2")
    night.wait(lambda: all(night.starts(night.head(i)) for i in gone))
    # A node loses power: its daemon, and all that it ran
    slurm.stop("n2")
    slurm.kill_jobs("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    night.wait(lambda: len(night.alive()) == 4)
    # The controller stops and comes back; the runs go on
    slurm.stop("slurmctld", signal.SIGTERM)
    assert night.waiting(capsys) == list(night.all)
    (night.folder / ".waves/go").touch()
    night.wait(lambda: "exit: 0" in night.log(min(set(night.all) - set(gone))))
    slurm.start("slurmctld")
    slurm.wait_for(lambda: "slurmctld is UP" not in slurm.run("squeue", ok=False), "slurmctld")
    night.wait(lambda: not night.alive())
    assert night.waiting(capsys) == gone
    commits = {i: night.head(i) for i in night.all}
    night.wave(capsys, only=gone)
    assert {i: len(night.starts(commits[i])) for i in night.all} == {i: 1 + (i in gone) for i in night.all}
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 5
    slurm.start("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    slurm.ready()


def test_a_record_that_dies_anywhere_goes_on(tmp_path, monkeypatch, capsys):
    night = Night(tmp_path, 3, monkeypatch)
    night.baselines()
    for i, value in zip(night.all, (0.8, 0.9, 1.2)):
        night.idea(i, value)
    night.start()
    night.wait(lambda: not night.alive())
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
            night.decide(capsys, "record")
        except KeyboardInterrupt:
            continue
        break
    assert n > 8
    night.consistent()
    assert night.statuses(2) == [("keep", "0.803000"), ("discard", "0.903000"), ("discard", "1.203000")]


def test_waves_without_slurm(tmp_path, monkeypatch, capsys):
    night = Night(tmp_path, 4, monkeypatch)
    night.wave(capsys, "0 1 2 3")
    for i in night.all:
        night.idea(i, 0.7 + i / 100, {2: HANG, 3: HANG, 4: "1 / 0"}.get(i, ""))
    night.start()
    night.wait(lambda: all(night.starts(night.head(i)) for i in night.all))
    night.wait(lambda: all("exit: " in night.log(i) for i in (1, 4)))
    assert re.search(r"ran: here:(\d)", night.log(1))[1] == "0"
    night.start()  # while they run: nothing happens to these
    time.sleep(2)
    # The machine goes down: a run and its script
    pid = night.pid(2)
    for one in (parent(pid), pid):
        os.kill(one, signal.SIGKILL)
    assert night.waiting(capsys)[:2] == [2, 3]
    (night.folder / ".waves/go").touch()
    night.wait(lambda: not night.alive())
    assert night.waiting(capsys) == [2]
    commits = {i: night.head(i) for i in night.all}
    night.wave(capsys, only=[2])
    assert [len(night.starts(commits[i])) for i in (2, 3)] == [2, 1]
    assert [status for status, _ in night.statuses(2)] == ["crash", "keep", "discard", "discard"]
    assert "wave 2: idea 4: ZeroDivisionError: division by zero" in (night.folder / "results.tsv").read_text()


def test_slips_of_the_agent(tmp_path, monkeypatch, capsys):
    night = Night(tmp_path, 2, monkeypatch)
    night.wave(capsys, "0 1")
    night.wave(capsys, "2 3")
    night.idea(1, 0.9)
    night.idea(1, 0.8)  # an idea of two commits
    assert night.waiting(capsys) == [1]
    night.idea(2, 0.6)
    night.start("0 1")  # ideas with seeds
    night.wait(lambda: not night.alive())
    assert f"must be one commit on top of {night.base}" in night.decide(capsys, "record")[1]
    night.sh("git -C .waves/1 reset -q --soft HEAD~2 && git -C .waves/1 commit -qm 'check whether\ttabs do harm'")
    night.commits = {night.base, *night.heads(1, 2)}
    night.start("0 1")
    night.wait(lambda: not night.alive())
    assert "an idea has the seed 0" in night.decide(capsys, "record")[1] and len(night.rows()) == 5
    night.start(only=[2])
    night.wait(lambda: not night.alive())
    # Nothing is moved over an edit that has no commit
    (night.folder / ".waves/1/train.py").write_text("an edit")
    assert ".waves/1/train.py has changes without a commit" in night.decide(capsys, "record")[1]
    night.sh("git -C .waves/1 restore train.py")
    night.decide(capsys, "record")
    night.consistent()
    assert [[row[1], *row[3:]] for row in night.rows()[-2:]] == [
        ["0.803000", "discard", "wave 3: check whether tabs do harm, 9 steps"],
        ["0.603000", "keep", "wave 3: idea 2, 9 steps"],
    ]
    # A kept commit needs a number. A crash says no seed, so it is not taken for the run of seed 0, which has its row
    for block in ("", "---\nseed:  5\n"):
        (night.folder / ".waves/1/run.log").write_text(f"{night.head()}\n{block}exit: 1\n")
        assert "must have a number" in night.decide(capsys, "record")[1]
    night.sh("git switch -q main")
    assert "this is main: git switch to it" in night.decide(capsys, "record")[1]
