"""A real Slurm of our own: munged, slurmctld and two slurmd on this machine, as the calling user, in one folder.

GPUs are links to /dev/null that gres.conf names as devices: Slurm counts them and sets CUDA_VISIBLE_DEVICES.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # the daemons are there, and not on everybody's PATH
PROGRAMS = "munged slurmctld slurmd sbatch squeue scontrol scancel".split()
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]

CONF = """
ClusterName=waves
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.soc
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
MessageTimeout=3
ReturnToService=2
KillWait=1
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=10000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """`with Slurm(folder) as slurm`: `slurm.env` is the environment for its commands. At the end all is killed."""

    def __init__(self, folder):
        self.folder, self.nodes, self.daemons = folder, ["n1", "n2"], {}
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=ports, user=getpass.getuser()))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        for i in (0, 1):
            (folder / f"gpu{i}").symlink_to(os.devnull)
        (folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}

    def start(self, name):
        """One daemon in the foreground, as our child: `munged`, `slurmctld` or a node's name."""
        command = ["slurmd", "-D", "-N", name] if name in self.nodes else [name, "-D"]
        if name == "munged":
            files = "socket", "key-file", "pid-file", "log-file", "seed-file"
            command = [name, "-F", "--force", *(f"--{file}={self.folder}/munge.{file[:3]}" for file in files)]
        options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=out, **options)

    def stop(self, name, how=signal.SIGKILL):
        process = self.daemons.pop(name)
        process.send_signal(how)
        process.wait()

    def run(self, *command, ok=True):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not ok or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            logs = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.[ol][uo]?")]
            assert not dead and time.monotonic() < deadline, (f"no {what}, ended: {dead}", *logs)
            time.sleep(0.1)

    def ready(self):
        """Wait until every node takes jobs."""
        self.wait_for(lambda: self.run("sinfo", "-hN", "-o", "%T", ok=False).split() == ["idle"] * 2, "idle nodes")

    def __enter__(self):
        try:
            self.start("munged")
            self.wait_for((self.folder / "munge.soc").exists, "munged")
            for name in ("slurmctld", *self.nodes):
                self.start(name)
            self.ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in list(self.daemons):
            self.stop(name)
        self.kill_jobs()

    def kill_jobs(self, node=""):
        """End what runs, everywhere or on one node: it outlives slurmd. A step's daemon has our log open, a job our
        environment."""
        log, conf = f"{self.folder}/{node}", f"SLURM_CONF={self.env['SLURM_CONF']}\0"
        for proc in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is somebody else's
                environ = (proc / "environ").read_bytes().decode(errors="replace")
                daemon = "slurmstepd" in (proc / "cmdline").read_text()
                if (daemon and any(os.readlink(file).startswith(log) for file in (proc / "fd").iterdir())) or (
                    conf in environ and f"SLURMD_NODENAME={node}" in environ
                ):
                    os.kill(int(proc.name), signal.SIGKILL)
