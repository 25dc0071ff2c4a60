"""Another build of PyTorch: the README's commands install it from an index (on loopback), and nothing takes it back."""

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

UV = os.environ.get("UV") or shutil.which("uv")
pytestmark = pytest.mark.skipif(not UV, reason="uv is not installed")

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
(COMMANDS,) = (code for code in BLOCKS if "torch-backend" in code)
(SANDBOX,) = (code for code in BLOCKS if "bwrap" in code)
SHOW = 'python -c "import torch; print(torch.__version__)"\n'
BUILD = "2.9.1+rocm6.4"


def make_wheel(index, name, version, needs=""):
    """Add a wheel to the folder `index`. As http.server lists it, it has no date, like those of PyTorch's own index."""
    (index / name).mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(index / name / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata + (needs and f"Requires-Dist: {needs}\n"))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def bash(tmp_path):
    """Runs a script in a project that has our pyproject.toml, with PyTorch as its only requirement."""
    for version in ("2.9.1", "2.13.0"):
        make_wheel(tmp_path / "default", "torch", version, "triton")
    make_wheel(tmp_path / "default", "triton", "3.5.1")
    make_wheel(tmp_path / "amd", "torch", BUILD, "pytorch-triton-rocm")
    make_wheel(tmp_path / "amd", "pytorch-triton-rocm", "3.5.1")
    project = tmp_path / "project"
    project.mkdir()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (project / "pyproject.toml").write_text(re.sub(r'^    "(?!torch==).*\n', "", pyproject, flags=re.M))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        # Nothing of this process's environment, so that uv cannot reach the packages that run the test
        env = {"PATH": f"{Path(UV).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "UV_PYTHON_DOWNLOADS": "never"}
        env |= {"VIRTUAL_ENV": str(project / ".venv"), "UV_CACHE_DIR": str(tmp_path / "cache")}
        env["UV_DEFAULT_INDEX"] = f"{url}/default"

        def run(script):
            # The backend stands for an index whose address is fixed in uv
            script = script.replace("--torch-backend auto", f"--index {url}/amd")
            done = subprocess.run(["bash", "-ec", script], cwd=project, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run(f"uv venv --python '{sys.executable}'")
        yield run
        server.shutdown()


def test_another_build_of_pytorch_stays(bash):
    assert COMMANDS.count("--torch-backend auto") == 1
    assert bash(COMMANDS + "uv run " + SHOW).split() == [BUILD]
    # The sandbox's commands, in another shell, where UV_NO_SYNC may be missing
    (paths,) = re.findall(r"^UV=.*\nPYTHON=.*\n", SANDBOX, re.M)
    assert bash(paths + "$VENV/bin/" + SHOW).split() == [BUILD]


def test_linux_on_arm_gets_a_pytorch_that_has_cuda_there(bash):
    arm, intel = ("2.13.0", "aarch64-unknown-linux-gnu"), ("2.9.1", "x86_64-unknown-linux-gnu")
    for version, platform in (arm, intel, ("2.9.1", "macos")):
        assert f"torch v{version}\n" in bash(f"uv tree --depth 1 --python-platform {platform}")
