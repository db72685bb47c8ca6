"""A Slurm of one node for the tests: this machine, a folder of its own, its own key and ports.

Root and Debian's packages ``slurm-wlm`` and ``munge`` are needed (``.ci/run`` installs them); no
systemd. Every daemon is a child of this process, and is stopped by its number.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "srun", "setpriv")

CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
# A requeued task waits until its credential has expired: two minutes, or so long (5 at least).
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
MpiDefault=none
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a Slurm for the tests is started by root only"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else ""


@contextmanager
def running() -> Iterator[Path]:
    """Inside, a Slurm runs; the path of its ``slurm.conf``."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir()
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (folder / "munge", key):
            shutil.chown(path, "munge", "munge")
        conf = folder / "slurm.conf"
        found = {"host": socket.gethostname().split(".")[0], "ports": _ports(2)}
        cores = max(2, len(os.sched_getaffinity(0)))
        conf.write_text(CONF.format(folder=folder, cores=cores, **found))
        become = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups"]
        places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={folder / 'munge' / file}" for name, file in places.items()]
        log = f"--log-file={folder / 'munge' / 'log'}"
        _start(stack, [*become, "munged", "--foreground", *options, log])
        _until(lambda: (folder / "munge" / "socket").exists(), "munged")
        for daemon in ("slurmctld", "slurmd"):
            _start(stack, [daemon, "-D", "-f", str(conf)])
        where = {**os.environ, "SLURM_CONF": str(conf)}
        ask = ["sinfo", "-h", "-o", "%T"]

        def idle() -> bool:
            said = subprocess.run(ask, env=where, capture_output=True, text=True, check=False)
            return said.stdout.strip() == "idle"

        _until(idle, "slurm")
        yield conf


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in found:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in found]


def _start(stack: ExitStack, words: list[str]) -> None:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)


def _until(done, what: str) -> None:
    for _ in range(300):
        if done():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{what} does not answer")
