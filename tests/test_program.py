"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

Runs are a stand-in, but for one of the real train.py. uv is one too: a scratch clone would install everything anew.
"""

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

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(*words, page=ONE_GPU, but="nothing of this kind"):
    """The one command of program.md, without its section on several GPUs, that has all these words."""
    found = [text for text in blocks(page) if all(word in text for word in words) and but not in text]
    assert len(found) == 1, (words, found)
    return found[0]


RUN, DECIDE, RECORD = (
    command(f"run prepare.py {word}\n", but="git status").strip() for word in "run decide record".split()
)
CHECK, CHECKED = (" ".join(found.split()) for found in re.findall(r"`(uv\s+run\s+prepare.py\s+\w+\s+check)`", ONE_GPU))
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
run = json.loads(pathlib.Path("run.json").read_text())
with open("../starts", "a") as starts:
    starts.write(f"{{run['commit'][:7]}} {{seed}} {{os.getpid()}}\\n")
report = dict(memory_gb="0.5", num_steps=9, attention="sdpa", harness="0123456789ab", machine=0.9, problems=[])
report["prepared"] = "uv run prepare.py --corpus=source"
print("step 1", flush=True)
time.sleep(0.5)
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
path.write_text(json.dumps(report | {{"val_bpb": f"{{value:.6f}}"}}))
"""
CONSTANTS = {"DECIDE_WAIT = 45": "DECIDE_WAIT = 5", "BEAT, WATCH = 3, 15": "BEAT, WATCH = 1, 4"}


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
        self.env |= {"AUTORESEARCH_CACHE": str(cache), "GIT_CONFIG_GLOBAL": os.devnull}
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

    def idea(self, value, what, fault=""):
        """An idea that has been committed and started"""
        self.edit(value, fault)
        self.sh(f"git commit -qam '{what}'")
        return self.run()

    def run(self, command=RUN):
        """Start what is next; its commit"""
        return re.search(r"^started \w+ (\w{7}), seed \d+$", self.sh(command), re.M)[1]

    def decide(self, **env):
        """What `decide` prints in the end, on one stream"""
        deadline = time.monotonic() + 60
        while (printed := self.sh(f"{DECIDE} 2>&1", ok=False, **env)).startswith("wait"):
            assert time.monotonic() < deadline, printed
        return printed

    def record(self, veto="", **env):
        self.decide()
        return self.sh(f"{RECORD} {veto} 2>&1", ok=False, **env)

    def head(self, tree="."):
        return self.sh(f"git -C {tree} rev-parse HEAD")[:7]

    def starts(self, commit=None):
        """[[commit, seed, pid] of each start]"""
        path = next(
            (path for path in (self.folder / ".waves/starts", self.folder.parent / "starts") if path.exists()), None
        )
        lines = [line.split() for line in path.read_text().splitlines()] if path else []
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
    for _ in range(3):
        clone.run()
        clone.record()
    return clone.head()


def test_a_night_in_small(clone):
    # Set-up
    (clone.folder / ".claude").mkdir()
    (clone.folder / ".claude/settings").write_text("the agent's own")
    (clone.folder / "results.tsv").write_text("an earlier night")
    (clone.folder / "results.tsv.tmp-1").write_text("of a record that was killed")
    assert re.fullmatch("agent <a@example.org> .*\n", clone.sh(command("GIT_AUTHOR_IDENT")))
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}-\d{4}", branch)

    # The noise: the harness chooses the seeds
    for seed in range(3):
        base = clone.run()
        assert f"\tbaseline, seed {seed}, 9 steps" in clone.record()
    scores = [float(row[1]) for row in clone.rows()[1:]]
    assert [row[0] for row in clone.rows()[1:]] == [base] * 3 == [clone.head()] * 3
    assert [path.read_text() for path in clone.folder.glob("results-until-*.tsv")] == ["an earlier night"]
    head, margin = statistics.mean(scores), 1.5 * statistics.stdev(scores)
    assert f"idea: head {head:.6f}, margin {margin:.6f}, n 0: " in clone.decide()
    assert "nothing new to run: commit an idea" in clone.sh(f"{RUN} 2>&1", ok=False)

    # One that is kept. Asked twice, it has one row
    clone.edit(0.9)
    clone.sh(command("git commit -qm", but="-C").replace("WHAT CHANGES", "batch 2^9"))
    assert re.fullmatch(r"run: idea \w{7}, seed 0 has not started → uv run prepare.py run\n", clone.sh(DECIDE))
    clone.run()
    assert "it is going on or has ended" in clone.sh(f"{RUN} 2>&1", ok=False)
    printed = clone.decide()
    assert printed.startswith("record: head ") and "\tkeep\tbatch 2^9, " in printed and len(clone.rows()) == 4
    assert "it is going on or has ended: `uv run prepare.py decide`" in clone.sh(f"{RUN} 2>&1", ok=False)
    clone.record()
    clone.record()
    kept = clone.head()
    assert len(clone.rows()) == 5 and clone.rows()[-1][0] == kept

    # One that is discarded: row, tag, reset. Nothing that has no commit is lost: the next idea, begun too early
    discarded = clone.idea(0.95, "checkpoint\tactivations")
    (clone.folder / "README.md").write_text("the human's own, not committed")
    clone.edit(-0.3, name="MORE")
    assert "\tdiscard\tcheckpoint activations, " in clone.record()
    assert clone.head() == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    assert re.findall("^[+-](?:VALUE|MORE).*", clone.sh("git diff train.py"), re.M) == ["-MORE = 0", "+MORE = -0.3"]
    clone.sh("git restore README.md train.py")
    assert ", n 1: " in clone.decide()

    # Crashes: with a line that is too long to show, with noise after it; time exceeded; killed; a hang
    tried = [clone.idea(0.9, "odd heads", "print('x' * 10**6); import atexit; atexit.register(print, 'leaked'); 1 / 0")]
    assert f"{tried[0]}\t0.000000\t0.0\tcrash\todd heads: ZeroDivisionError: division by zero" in clone.record()
    assert len(clone.sh(LOOK)) < 7000
    tried.append(clone.idea(0.8, "too late", "report['problems'] = ['training took 9 s']"))
    assert "\tcrash\ttoo late: training took 9 s" in clone.record()
    tried.append(clone.idea(0.8, "killed", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert "\tcrash\tkilled: killed by SIGKILL: step 1" in clone.record()
    tried.append(clone.idea(0.8, "hang", "time.sleep(500)"))
    clone.edit(0.7)
    printed = clone.record()
    assert "\tcrash\thang: hang: no end after 6 s" in printed
    assert "the edit of train.py does not fit the new head" in printed and "+VALUE = 0.7" in clone.sh(
        "git stash show -p"
    )
    clone.sh("git stash drop -q")
    assert 'run.py", line ' in clone.sh("cat run.log")  # where it hung
    # One that would be kept, but for the human's limits
    tried.append(clone.idea(0.6, "simpler: batch 2^8"))
    assert f"1234567: the ideas that have no row are {tried[-1]}\n" in clone.record("discard 1234567")
    clone.record("discard")
    assert clone.rows()[-1][3] == "discard" and "nothing to record" in clone.record(f"discard {tried[-1]}")

    # The check finds commits and seeds, three each, and moves no bar
    before, start = clone.decide(), CHECK
    assert clone.sh(CHECKED) == f"run: check {kept}, seed 100 has not started → {CHECK}\n"
    for seed, commit in [(seed, commit) for seed in (100, 101, 102) for commit in (kept, base)]:
        assert clone.run(start) == commit
        start = RUN  # it goes on until it is complete
        assert "discard: the ideas that have no row are none" in clone.record("discard")
        assert f"{commit}\t" in clone.record() and clone.rows()[-1][4].startswith(f"check, seed {seed}, ")
    assert "has ended" in clone.sh(f"{CHECK} 2>&1", ok=False)
    assert clone.sh(CHECKED).splitlines() == [
        "idea: the check is complete",
        f"baseline {base}, 3 of 3 fresh seeds: {1 + statistics.mean(NOISE[:3]):.6f} (0.999 to 1.003)",
        f"branch {kept}, 3 of 3 fresh seeds: {0.9 + statistics.mean(NOISE[:3]):.6f} (0.899 to 0.903)",
    ]
    assert clone.decide() == before and clone.head() == kept

    # Picking up again, with everything but the files forgotten
    seen = clone.sh(command("git status -sb"))
    assert f"## {branch}" in seen and "batch 2^9" in seen and "check, seed 100" in seen and before in seen

    # After the night
    rows = clone.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"] and {len(row) for row in rows} == {5}
    assert [row[0] for row in rows[1:]] == [base] * 3 + [kept, discarded, *tried] + [kept, base] * 3
    assert "".join(row[3][0] for row in rows[1:]) == "kkkkdccccdkkkkkk"
    assert clone.sh("git status --porcelain -uno") == "" and clone.sh("git ls-files results.tsv run.*") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, base]
    assert sorted(clone.sh("git tag").split()) == sorted(f"tried/{commit}" for commit in [discarded, *tried])

    # The table is lost, or is not that of this night
    text = (clone.folder / "results.tsv").read_text()
    for damage in ("rm results.tsv run.json", "echo mine > results.tsv"):
        clone.sh(damage)
        clone.record()
        assert (clone.folder / "results.tsv").read_text() == text
    assert sorted(p.read_text() for p in clone.folder.glob("results-until-*.tsv")) == ["an earlier night", "mine\n"]

    # On no branch of a night nothing is done
    clone.sh("git switch -q main")
    for words in (RUN, DECIDE, RECORD):
        assert "this is main: git switch to it" in clone.sh(f"{words} 2>&1", ok=False)


def test_a_real_run(tmp_path, session_cache):
    clone = Clone(tmp_path / "clone", session_cache, (ROOT / "train.py").read_text(encoding="utf-8"))
    clone.env["CUDA_VISIBLE_DEVICES"] = ""
    clone.sh("git switch -q -c autoresearch/t")
    commit = clone.run()
    assert re.search(rf"{commit}\t\d\.\d+\t\d\.\d\tkeep\tbaseline, seed 0, \d+ steps\n", clone.record())
    assert "\nharness: " in clone.sh(LOOK) and "attention: sdpa" in clone.sh(LOOK)


def test_what_was_cut_off_starts_again(clone):
    baseline(clone)
    commit = clone.idea(0.9, "slow", "time.sleep(3)")
    clone.wait(lambda: clone.starts(commit))
    pid = int(clone.starts(commit)[0][2])
    os.kill(parent(pid), signal.SIGKILL)
    clone.wait(lambda: not lives(pid))  # it goes with its supervisor
    assert f"run: idea {commit}, seed 0 was cut off (step 1) → uv run prepare.py run" in clone.decide()
    assert clone.run() == commit
    assert f"{commit}\t0.903000\t0.5\tkeep" in clone.record() and len(clone.starts(commit)) == 2


def test_nothing_of_a_run_lives_on(clone):
    baseline(clone)
    clone.idea(
        0.9, "a child", "subprocess.Popen(['bash', '-c', 'echo $$ > ../child; while sleep 0.1; do echo gpu; done'])"
    )
    assert "\tkeep\ta child" in clone.record()
    clone.wait(lambda: not lives(int((clone.folder.parent / "child").read_text())))


def test_a_terminal_that_is_closed_and_a_run_typed_twice(clone):
    baseline(clone)
    clone.edit(0.9, "time.sleep(2)")
    clone.sh("git commit -qam twice")
    typed = f"script -qec 'bash --norc -ic \"{RUN} & {RUN}; wait; exit\"' /dev/null"  # a terminal, which then hangs up
    printed = clone.sh(f"{typed} 2>&1", ok=False)
    assert printed.count("started idea") == 1 and "it is going on" in printed
    assert "\tkeep\ttwice, 9 steps" in clone.record() and len(clone.starts(clone.head())) == 1


def test_two_records_at_once(clone):
    baseline(clone)
    commit = clone.idea(0.95, "two", "time.sleep(1)")
    for _ in range(2):
        clone.sh(f"({RECORD} & {RECORD} & wait) 2>&1")
    assert [row[0] for row in clone.rows()].count(commit) == 1 and clone.rows()[-1][0] == commit


def test_the_human_commits_in_the_night(clone):
    base = baseline(clone)
    for value, kept in ((1.2, []), (0.9, ["under"])):
        clone.sh("echo >> program.md && git commit -qam before")
        clone.idea(value, "under", "time.sleep(1)")
        clone.sh("echo >> program.md && git commit -qam after")
        assert 'read its section "From the human" again' in clone.record()
        assert clone.rows()[-1][3] == ("keep" if kept else "discard")
        assert clone.sh("git log --format=%s -n 1") in ("after\n", 'Revert "under"\n')
        assert bool(clone.sh(f"git diff {base} -- train.py")) == bool(kept)
    clone.idea(1.2, "next")
    assert "From the human" not in clone.record()
    assert clone.rows()[-1][3] == "discard" and clone.sh("git log --format=%s -n 1") == "after\n"


def test_what_is_refused(clone):
    base = baseline(clone)
    commit = clone.idea(0.9, "another cache", "report |= dict(harness='ba9876543210', prepared='otherwise')")
    printed = clone.record()
    assert printed.startswith("run: ") and "ba9876543210, the baseline's 0123456789ab: first `uv run prepa" in printed
    assert clone.run() == commit and len(clone.rows()) == 4  # `run` starts it again
    clone.decide()
    clone.sh("git reset -q --hard HEAD~1 && echo >> README.md")
    clone.edit(0.9)
    clone.sh("git commit -qam 'and another file'")
    for words in (RUN, DECIDE, RECORD):
        assert "changes more than train.py" in clone.sh(f"{words} 2>&1", ok=False)
    clone.sh("git reset -q --hard HEAD~1")
    for value in (0.9, 0.8):
        clone.edit(value)
        clone.sh("git commit -qam 'a step'")
    assert f"must be one commit on top of {base}" in clone.sh(f"{RUN} 2>&1", ok=False)
    clone.sh("git reset -q --hard HEAD~2")
    assert "there is no .waves/7" in clone.sh(f"{RUN} 7 2>&1", ok=False)
    for words in ("run twice", "run 1 check", "decide x", "record x"):
        assert "`prepare.py run" in clone.sh(f"uv run prepare.py {words} 2>&1", ok=False)
    assert len(clone.rows()) == 4


def test_a_baseline_needs_a_number(clone):
    clone.edit(1.0, "1 / 0")
    clone.sh("git switch -q -c autoresearch/t && git commit -qam 'a bad start'")
    for _ in range(2):
        clone.run()
        assert "must run once more: it has no number (ZeroDivisionError" in clone.record()


def test_another_machine_or_kernel_is_said(clone):
    baseline(clone)
    # Slower: once more. The try counts whose machine was more like the baseline's
    count = "tries = open('../tries', 'a+'); tries.write('x'); tries.seek(0); second = len(tries.read()) % 2 == 0"
    commit = clone.idea(0.9, "busy", f"{count}; VALUE += second; report |= dict(machine=0.7 - 0.1 * second)")
    text = "machine 22% slower than the baseline's"
    assert f"run: idea {commit}, seed 0 must run once more: {text} → uv run" in clone.record()
    clone.run()
    assert f"{commit}\t0.903000\t0.5\tkeep\tbusy, 9 steps, {text}\n" in clone.record()
    # It stays so: not once more. Faster: it is never kept
    commit = clone.idea(0.8, "faster", "report |= dict(machine=1.2, attention='flex')")
    printed = clone.record()
    assert f"{commit}\t0.803000\t0.5\tdiscard\tfaster, 9 steps, machine 33% faster than the baseline's\n" in printed
    assert "a faster machine keeps nothing" in printed and "kernel flex, not the one of the base" in printed
    commit = clone.idea(0.7, "within a tenth", "report['machine'] = 0.97")
    assert f"{commit}\t0.703000\t0.5\tkeep\twithin a tenth, 9 steps\n" in clone.record()


def test_a_baseline_on_another_machine_runs_once_more(clone):
    clone.sh("git switch -q -c autoresearch/t")
    clone.edit(1.0, "report['machine'] = 0.9 - 0.2 * (seed == 1)")
    clone.sh("git commit -qam start")
    clone.run()
    clone.record()
    clone.run()
    assert "seed 1 must run once more: machine 22% slower than the baseline's" in clone.decide()
    clone.run()
    assert "note: the machine's speed was 0.7 to 0.9" in clone.record()
    clone.run()
    printed = clone.record()
    assert "\tbaseline, seed 2, 9 steps" in printed and "begin a new night" in printed


def test_a_run_that_another_one_replaces_gives_it_no_number(clone):
    baseline(clone)
    first = clone.idea(0.6, "a slip", "time.sleep(0.2)")
    clone.edit(0.6, "1 / 0")
    clone.sh("git commit -qa --amend -m crashes")
    assert f"note: the run of {first} did not end, and has no row" in clone.sh(RUN)
    clone.decide()
    time.sleep(1)
    assert f"{clone.head()}\t0.000000\t0.0\tcrash\tcrashes: ZeroDivisionError" in clone.record()
    assert not list(clone.folder.glob("run.1*"))


def test_the_baseline_stays_where_it_was_begun(clone):
    base = clone.head()
    clone.sh("git switch -q -c autoresearch/t")
    clone.run()
    clone.edit(0.9)
    clone.sh("git commit -qam 'too early'")
    for _ in range(3):
        clone.record()
        clone.sh(f"{RUN} 2>&1")
    assert [row[0] for row in clone.rows()[1:]] == [base] * 3
    assert "\tkeep\ttoo early, 9 steps" in clone.record()


def test_a_check_without_a_number_is_a_crash_and_an_idea_waits_for_no_check(clone):
    clone.edit(1.0, "if seed == 101: raise ValueError('nan')")
    clone.sh("git switch -q -c autoresearch/t && git commit -qam start")
    base = baseline(clone)
    assert clone.sh(CHECKED) == "idea: nothing was kept, so there is nothing to check\n"
    clone.idea(0.9, "slow", "time.sleep(1)")
    for words in (CHECK, CHECKED):
        assert "has no row" in clone.sh(f"{words} 2>&1", ok=False)
    clone.record()
    clone.run(CHECK)
    for _ in range(6):
        clone.record()
        clone.sh(RUN, ok=False)
    assert [row[3] for row in clone.rows()[-6:]] == ["keep", "keep", "keep", "crash", "keep", "keep"]
    assert f"baseline {base}, 2 of 3 fresh seeds: 1.001000 (0.999 to 1.003)\n" in clone.sh(CHECKED)
    # The next check has other seeds, and a baseline of its own hour
    clone.idea(0.8, "better")
    clone.record()
    for commit in (clone.head(), base):
        assert clone.run(CHECK) == commit and ", seed 103, " in clone.record()


def test_settings_and_locale_change_nothing(clone):
    baseline(clone)
    for key in ("log.showSignature true", "color.ui always", "commit.encoding ISO-8859-1"):
        clone.sh(f"git config {key}")
    for env in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        clone.idea(1.2, "größer 0.4→0.3 🚀")
        clone.record(**env)
        assert clone.rows()[-1][4] == "größer 0.4→0.3 🚀, 9 steps"


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash p"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(PAGE.splitlines()) <= 140
