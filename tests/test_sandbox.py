"""The sandbox of the README, run as it stands there: what works inside, and what cannot be reached."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

UV = os.environ.get("UV") or shutil.which("uv")
README = (ROOT / "README.md").read_text(encoding="utf-8")
(COMMAND,) = (code for code in re.findall(r"```bash\n(.*?)```", README, re.S) if "bwrap" in code)


PLAIN = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev true"  # containers often refuse namespaces
DONE = subprocess.run(PLAIN, shell=True, capture_output=True, text=True)
pytestmark = pytest.mark.skipif(bool(DONE.returncode or not UV), reason=f"no uv, or no sandbox here: {DONE.stderr}")


@pytest.fixture
def home(tmp_path):
    """The user's real home, with things that the agent must not see, and a clone in it."""
    home = tmp_path / "home"
    for folder in (".ssh", ".cache/huggingface/hub", "clone"):
        (home / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "prepare.py", "train.py"):  # the first, or uv finds no project
        shutil.copy(ROOT / name, home / "clone")
    git = f"git -C {home}/clone -c user.name=t -c user.email=t@example.org"
    subprocess.run(f"{git} init -q && {git} add -A && {git} commit -qm baseline", shell=True, check=True)
    return home


def sandboxed(script, folder, home, cache, options=""):
    """The README's command in `folder`, with a shell that runs `script` as the agent."""
    assert COMMAND.count("YOUR_AGENT") == 1
    command = COMMAND.replace("YOUR_AGENT", f"{options} bash -c {shlex.quote(script)}")
    env = {**os.environ, "HOME": str(home), "AUTORESEARCH_CACHE": str(cache), "PASSWORD": "a secret"}
    # The environment that runs this test, as it is: uv is not to look for packages
    env |= {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1", "PATH": f"{Path(UV).parent}:{env['PATH']}"}
    return subprocess.run(["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, timeout=280)


WORK = """
set -e; export OMP_NUM_THREADS=1
git switch -qc autoresearch/test
until grep -sq keep results.tsv; do uv run prepare.py run --wait 1; done
cat results.tsv
git worktree add -q --detach .waves/1
cd .waves/1
echo '# another' >> train.py
git commit -qam 'another'
"""


@pytest.mark.parametrize("place", ["the clone", "a worktree elsewhere"])
def test_a_run_ends_in_a_number_and_git_works(place, home, session_cache, tmp_path):
    clone = folder = home / "clone"
    if place != "the clone":
        folder = tmp_path / "elsewhere" / "agent1"
        subprocess.run(["git", "-C", clone, "worktree", "add", "-q", "--detach", folder], check=True)
    done = sandboxed(WORK, folder, home, session_cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\w{7}\t[0-3]\.\d{6}\t\d\.\d\tkeep\tbaseline, seed 0, \d+ steps\t", done.stdout, re.M)
    deadline = time.monotonic() + 10  # the second run, which is detached, ends with the sandbox
    while f"{home}/" in subprocess.check_output(["ps", "-Awwo", "args="], text=True):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log = ["git", "-C", folder / ".waves" / "1", "log", "-1", "--format=%s, %an"]
    assert subprocess.check_output(log, text=True) == "another, agent\n"


def test_nothing_else_can_be_written(home, session_cache):
    refused = ["/", "/usr", "/etc", "/sys", session_cache, sys.prefix, sys.base_prefix, home / ".cache/huggingface/hub"]
    private = [home, "/tmp", "/dev/shm"]  # folders of the sandbox's own under the same names
    clone = [home / "clone", home / "clone" / ".git"]
    name = f"from-agent-{os.getpid()}"
    refused, private, clone = ([Path(folder) / name for folder in kind] for kind in (refused, private, clone))
    everywhere = shlex.join(map(str, refused + private + clone))
    script = f"for file in {everywhere}; do touch $file && echo $file; done; true"
    done = sandboxed(script, home / "clone", home, session_cache)
    there = [file for file in refused + private + clone if file.exists()]
    for file in there:
        file.unlink()
    assert done.stdout.splitlines() == [str(file) for file in private + clone], done.stderr
    assert there == clone


LOOK = """
echo processes: $(cat /proc/[0-9]*/comm)
echo secrets: $PASSWORD $(ls -d ~/.ssh /var/lib; find /run -type s)
echo network: $(ls /sys/class/net; (echo hello > /dev/tcp/127.0.0.1/PORT) 2>/dev/null && echo connected)
"""


@pytest.mark.parametrize("options", ["", "--share-net"])
def test_nothing_else_can_be_seen(options, home, session_cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = LOOK.replace("PORT", str(server.getsockname()[1]))
        done = sandboxed(script, home / "clone", home, session_cache, options)
    processes, secrets, network = done.stdout.splitlines()
    assert {"bwrap"} < set(processes.split()[1:]) <= {"bwrap", "bash", "cat"}, done.stdout
    assert secrets == "secrets:", done.stdout
    assert network.endswith(" connected") if options else "connected" not in network
