"""program.md's waves, its commands run as they stand, by a real Slurm and as plain processes, through every fault.

Runs are the stand-in of test_program.py, which says where and when it ran.
"""

import json
import os
import re
import signal
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import wait_until
from slurm import MISSING, Slurm
from test_program import CHECK, DISCARD, NOISE, RUN, SEVERAL_GPUS, SHAPE, Clone, blocks, lives, parent

import prepare

(WORKTREES,) = blocks(SEVERAL_GPUS)
(CLEAN,) = re.findall(r"`(for w in [^`]*)`", SEVERAL_GPUS)
BAR = 1 - 1.5 * statistics.stdev(NOISE)
# till the test says go; its log ends within a line
HANG = """print("step", end="", flush=True)
while not os.path.exists("../go") and time.time() < began + 120: time.sleep(0.1)"""


class Night(Clone):
    """An agent without memory: it does what the page and the last command say."""

    def __init__(self, folder, gpus, cache, slurm=None):
        super().__init__(folder, cache)
        self.all, self.command, self.key = range(1, gpus + 1), RUN, "row"
        if slurm:
            self.env |= {"SLURM_CONF": slurm.env["SLURM_CONF"]}
            self.command, self.key = f"{RUN} --sbatch '--mem=1'", "slurm"
        self.sh("git switch -q -c autoresearch/t")
        self.sh(WORKTREES.replace("seq K", f"seq {gpus}"))
        self.base, self.commits = self.head(), {self.head()}

    def at(self, i):
        return self.head(f".waves/{i}")

    def text(self, i, name="run.log"):
        return (self.folder / f".waves/{i}/{name}").read_text()

    def begin(self):
        """Start what is next, and wait for none of it. Returns {worktree: commit}"""
        commits = {i: self.at(i) for i in self.all}

        def begun(self):
            runs = [json.loads(self.text(i, "run.json")) for i in self.all]
            known = [run["row"][0] for run in runs if self.key in run] == list(commits.values())
            return known and (self.key == "slurm" or all(map(self.starts, commits.values())))

        self.background(self.command, begun)
        return commits

    def idea(self, i, value, fault="", what=None, name="VALUE"):
        self.edit(value, fault, f".waves/{i}", name)
        self.sh(f"git -C .waves/{i} commit -qam '{what or f'idea {i}'}'")
        self.commits.add(self.at(i))

    def wave(self, command=RUN):
        """What is printed after a wave"""
        printed = self.run(self.command.replace(RUN, command))
        assert printed.startswith("idea: "), (printed, self.sh("tail -n 5 .waves/*/run.log"))
        self.consistent()
        return printed

    def consistent(self):
        """Every commit of the waves has one row, the baseline one a seed; tags, branch and trees are as on one GPU."""
        rows = self.rows()
        ideas = [row for row in rows if not re.search("(baseline|check), seed", row[4])]
        assert Counter(row[0] for row in ideas) == Counter(self.commits - {self.base})
        assert len({(row[0], row[5]) for row in rows}) == len(rows)
        kept = [row[0] for row in ideas if row[3] == "keep"]
        assert self.sh(f"git log --reverse --format=%h {self.base}..").split() == kept
        assert self.sh("git branch --show-current") == "autoresearch/t\n"
        assert {tag[6:] for tag in self.sh("git tag").split()} == {row[0] for row in ideas if row[3] != "keep"}
        assert self.sh("git status --porcelain") == ""
        assert {self.at(i) for i in self.all} == {self.head()}

    def statuses(self, wave):
        rows = [row for row in self.rows() if row[6] == str(wave)]
        return [(row[3], row[1]) for row in sorted(rows, key=lambda row: float(row[1]))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if MISSING:
        pytest.skip(f"not installed: {' '.join(MISSING)} (apt-get install slurm-wlm munge)")
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_waves_of_eight_through_slurm(tmp_path, slurm, session_cache):
    night = Night(tmp_path, 8, session_cache, slurm)
    # Wave 1: the noise. Two nodes with two GPUs each, so half of the runs wait in the queue
    night.wave()
    ran = [re.search(r"ran: (\S+) (\S+) (\S+)", night.text(i)).groups() for i in night.all]
    assert {where for where, *_ in ran} == {"n1:0", "n1:1", "n2:0", "n2:1"}
    runs = sorted((where, float(began), float(ended)) for where, began, ended in ran)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(runs))  # never two on one GPU
    assert night.statuses(1) == [("keep", f"{1 + noise:.6f}") for noise in sorted(NOISE)]

    # Wave 2: the bar is of the head's mean, 1, and of the noise; four are below it
    for i, value in zip(night.all, [1.2, 0.95, BAR + 2e-6, 0.96, BAR - 2e-6, 1.0, 0.9, 0.999], strict=True):
        night.idea(i, f"{value - NOISE[0] - (i in (2, 4)):.6f}", name="MORE" if i in (2, 4) else "VALUE")
    others = [f"tried/{night.at(i)}" for i in (2, 4, 5)]
    printed = night.wave()
    assert [f"tried/{commit}" for commit in re.findall(r"\n(\w+).*, also below the bar", printed)] == others
    assert re.findall(r"(idea \d), 9 steps, near miss", printed) == ["idea 3", "idea 8"]
    assert [status for status, _ in night.statuses(2)] == ["keep"] + ["discard"] * 7

    # Wave 3: one of the others on top of it; and simpler code that costs little. The other worktrees have no idea
    night.sh(f"git -C .waves/1 cherry-pick -n {others[0]} && git -C .waves/1 commit -qm both")
    night.commits.add(night.at(1))
    night.idea(2, 0.899, what="simpler: less code")
    assert ", also below the bar\n" in night.wave()  # both passed
    assert night.statuses(3) == [("keep", "0.847000"), ("discard", "0.902000")]

    # Wave 4, the check: baseline and branch on three fresh seeds. Wave 5: simpler code is kept
    before, mean = night.head(), statistics.mean(NOISE[:3])
    printed = night.wave(CHECK)
    for commit, value in (night.base, 1.0), (before, 0.844):
        assert f" {commit}, 3 of 3 fresh seeds: {value + mean:.6f} " in printed
    assert {(row[5], row[6]) for row in night.rows()[-6:]} == {("100", "4"), ("101", "4"), ("102", "4")}
    night.idea(1, 0.901, what="worse")
    night.idea(2, 0.898, what="simpler: less code")
    assert "head 0.847000, " in night.wave()  # simpler code does not raise the bar
    assert night.statuses(5) == [("keep", "0.848000"), ("discard", "0.851000")] and night.head() != before

    # The end: only branch, tags and table are left
    night.sh(CLEAN)
    assert night.sh("git worktree list --porcelain").count("worktree ") == 1
    assert night.sh("git status --porcelain") == ""


def jobs(night, state="R"):
    """{worktree: Slurm's name of its job}"""
    names = {run["slurm"]: i for i in night.all for run in [json.loads(night.text(i, "run.json"))]}
    return {names[job]: job for job in night.sh(f"squeue -h -t {state} -o %i").split()}


def test_every_fault_through_slurm(tmp_path, slurm, session_cache):
    night = Night(tmp_path, 8, session_cache, slurm)
    night.wave()
    faults = {
        1: "report['problems'] = ['too late']",
        2: "raise SystemExit('no memory')",
        3: "raise ValueError('the loss is nan')",
        4: "print('x' * 10**7); raise SystemExit('y' * 10**7)",
    }
    faults |= dict.fromkeys((5, 6, 7), HANG)
    for i in night.all:
        night.idea(i, 0.7 + i / 100, faults.get(i, ""))
    commits = night.begin()
    slurm.run("scancel", jobs(night, "PD")[8])
    # Cancelled while it runs; its supervisor killed; killed itself, as by a lack of memory: that is a crash
    wait_until(lambda: all(night.starts(commits[i]) for i in (5, 6, 7)))
    pids = {i: night.pid(f".waves/{i}") for i in (5, 6, 7)}
    slurm.run("scancel", jobs(night)[5])
    os.kill(parent(pids[6]), signal.SIGKILL)
    os.kill(pids[7], signal.SIGKILL)
    wait_until(lambda: not lives(pids[5]))  # else it may end by itself
    (night.folder / ".waves/go").touch()
    night.wave()
    kinds = [("crash", "0.000000")] * 5 + [("keep", "0.753000"), ("discard", "0.763000"), ("discard", "0.783000")]
    assert night.statuses(2) == kinds
    assert {i: len(night.starts(commits[i])) for i in night.all} == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 1, 8: 1}

    # A node loses power: its daemon, and all that it ran
    (night.folder / ".waves/go").unlink()
    for i in night.all:
        night.idea(i, 0.6 + i / 100, HANG)
    commits = night.begin()
    wait_until(lambda: len(jobs(night)) == 4)
    nodes = dict(line.split() for line in night.sh("squeue -h -t R -o '%i %N'").splitlines())
    gone = sorted(i for i, job in jobs(night).items() if nodes[job] == "n2")
    wait_until(lambda: all(night.starts(commits[i]) for i in gone))
    slurm.stop("n2")
    slurm.kill_jobs("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    wait_until(lambda: len(jobs(night)) + len(jobs(night, "PD")) == 6)
    # The controller stops and comes back; the runs go on. Nobody knows the queue now: nothing is started
    slurm.stop("slurmctld", signal.SIGTERM)
    assert night.sh(night.command, ok=False).startswith("wait: ")
    (night.folder / ".waves/go").touch()
    slurm.start("slurmctld")
    slurm.wait_for(lambda: "slurmctld is UP" not in slurm.run("squeue", ok=False), "slurmctld")
    slurm.start("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume", ok=False)  # it may be up already
    slurm.ready()
    night.wave()
    assert {i: len(night.starts(commits[i])) for i in night.all} == {i: 1 + (i in gone) for i in night.all}
    assert [status for status, _ in night.statuses(3)] == ["keep"] + ["discard"] * 7


def test_waves_without_slurm(tmp_path, session_cache):
    night = Night(tmp_path, 4, session_cache)
    night.wave()
    assert [row[4:7] for row in night.rows()] == [[f"baseline, seed {i}, 9 steps", str(i), "1"] for i in range(4)]
    for i in night.all:
        night.idea(i, 0.7 + i / 100, {2: HANG, 3: HANG, 4: "1 / 0"}.get(i, ""))
    commits = night.begin()
    wait_until(lambda: "ran: here:0 " in night.text(1))
    # The machine goes down: a run and its supervisor
    os.kill(parent(night.pid(".waves/2")), signal.SIGKILL)
    (night.folder / ".waves/go").touch()
    night.wave()
    assert [len(night.starts(commits[i])) for i in (2, 3)] == [2, 1]
    assert [status for status, _ in night.statuses(2)] == ["crash", "keep", "discard", "discard"]
    assert "idea 4: ZeroDivisionError: division by zero" in (night.folder / "results.tsv").read_text()
    printed = night.sh(DISCARD)  # it costs more than the human allows
    assert re.findall(r"\n(\w+)\t.*, also below the bar", printed) == [commits[2], commits[3]]
    night.consistent()
    assert " ".join(status for status, _ in night.statuses(2)) == "crash discard discard discard"


def test_a_worktree_without_a_gpu_is_refused(monkeypatch):
    trees = [Path(".waves/1"), Path(".waves/2")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [prepare.own_gpu(tree, trees)["CUDA_VISIBLE_DEVICES"] for tree in trees] == ["3", "GPU-5"]
    assert prepare.own_gpu(Path(), [Path()]) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(prepare.PrepareError, match=r"2 worktrees, 1 visible GPU.*`git worktree remove \.waves/2`"):
        prepare.own_gpu(trees[1], trees)


def test_a_run_without_a_row_does_not_take_those_of_the_others(tmp_path, session_cache):
    night = Night(tmp_path, 2, session_cache)
    night.edit(1.0, "assert seed != 1 or os.path.exists('../../go')")
    night.sh("git commit -qam base && for i in 1 2; do git -C .waves/$i switch -q --detach autoresearch/t; done")
    assert all("the baseline has no number (AssertionError" in night.run() for _ in range(3))
    assert [row[5:7] for row in night.rows()] == [["0", "1"], ["2", "2"]]
    (night.folder / "go").touch()
    assert night.run().startswith("idea: ") and [row[5] for row in night.rows()] == ["0", "2", "3", "1", "4"]


def test_slips_of_the_agent(tmp_path, session_cache):
    night = Night(tmp_path, 2, session_cache)
    night.idea(2, 0.6)  # before the baseline: it waits
    night.idea(1, 0.9)  # an idea of two commits
    night.idea(1, 0.8)
    night.mend(SHAPE, "'check whether'")
    assert [row[5:7] for row in night.rows()] == [["0", "1"], ["1", "1"], ["2", "2"], ["3", "2"]]
    night.commits = {night.base, night.at(1), night.at(2)}
    night.edit(-0.3, "", ".waves/1", "MORE")  # has no commit
    night.sh("cd .waves/1 && uv run prepare.py run")
    back = re.search("laid aside: `(git -C .waves/1 apply .*)` brings", night.wave())[1]
    assert night.statuses(3) == [("keep", "0.603000"), ("discard", "0.803000")]
    assert [row[4] for row in night.rows()[-2:]] == ["check whether, 9 steps, also below the bar", "idea 2, 9 steps"]
    night.sh(f"{back} && git -C .waves/1 commit -qam 'laid aside' && rm .waves/1/edit-*")
    night.commits.add(night.at(1))
    night.wave()
    assert night.rows()[-1][1:5] == ["0.303000", "0.5", "keep", "laid aside, 9 steps"]
    # An idea in the clone
    night.edit(0.5)
    night.sh("git commit -qam 'in the wrong place'")
    pick, reset = re.findall("`(git -C [^`]*)`", night.run())
    night.sh(f"git -C .waves/1 config merge.conflictStyle merge; {reset}")
    assert pick.startswith("git -C .waves/1 cherry-pick ")
    # The same idea in two worktrees runs once
    night.idea(1, 0.55)
    night.sh("git -C .waves/2 switch -q --detach $(git -C .waves/1 rev-parse HEAD)")
    night.wave()
    # A commit of another file
    night.sh("cd .waves/1 && echo >> plans.md && git add plans.md && git commit -qm plans")
    assert SHAPE in night.run() and (night.folder / ".waves/1/plans.md").exists()
