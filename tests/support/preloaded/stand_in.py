"""What stands for a zygote that was forked elsewhere: it ends when that ends, with its status, and that ends with it."""

import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

# What may differ from the mother's environment: read when it is used, or the same for all tests of a session.
FREE = (
    *("LLMCLOUD_", "JUPYTER_", "JPY_", "PYTEST_", "IPYTHON", "DASK_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *("HOME", "HF_HOME", "MPLCONFIGDIR", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES", "TERM", "SSH_", "XDG_"),
)
MAX_ENV = 1 << 16


def key_of(env):
    """Names the mothers that live where this process does, and whose imports saw such an environment."""
    fixed = {name: value for name, value in env.items() if not name.startswith(FREE)}
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user", "uts")]  # hosts of a test
    return hashlib.sha256(json.dumps([sys.executable, fixed, spaces], sort_keys=True).encode()).hexdigest()[:12]


def be_forked(folder, arguments):
    """Have it forked, and stand for it; returns when it must be started as usual."""
    path = os.path.join(folder, f"{key_of(os.environ)}.sock")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not _connects(connection, path) and not (_starts(path) and _connects(connection, path)):
        return
    control = int(arguments[0])
    asked = {"env": dict(os.environ), "cwd": os.getcwd()}
    try:
        socket.send_fds(connection, [json.dumps(asked).encode()], [control, 0, 1, 2])
    except OSError:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for fd in (control, 0, 1, 2):
        os.close(fd)
    try:
        status = int(connection.recv(64) or -signal.SIGKILL)
    except OSError:
        status = -signal.SIGKILL
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _connects(connection, path):
    try:
        connection.connect(path)
    except OSError:
        return False
    return True


def _starts(path):
    """Start a mother for environments like this one, when it is the second of its kind; whether there is one then."""
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return True
        if not os.read(lock, 1):
            os.write(lock, b"1")
            return False
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(64)
        env = {name: value for name, value in os.environ.items() if name != "LLMCLOUD_TEST_ID"}
        env["LLMCLOUD_TEST_PADDING"] = "." * MAX_ENV  # over which a zygote's own environment is written
        here = os.path.dirname(__file__)
        # By a shell that ends at once: nobody's child, since it outlives whoever is the first to need it.
        command = ["sh", "-c", '"$@" &', "sh", sys.executable, os.path.join(here, "mother.py"), str(listener.fileno())]
        null, fds = subprocess.DEVNULL, [listener.fileno()]
        with open(f"{path}.log", "ab") as log:
            given = {"env": env, "cwd": "/", "stdin": null, "stdout": log, "stderr": log, "pass_fds": fds}
            subprocess.run(command, check=True, start_new_session=True, **given)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
