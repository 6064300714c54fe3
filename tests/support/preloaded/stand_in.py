"""What stands for a process that was forked elsewhere: it ends when that ends, with its status, and that ends with it."""

import fcntl
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys

import kinds

# What may differ from the mother's environment: read when it is used, or the same for all tests of a session.
FREE = (
    *("LLMCLOUD_", "JUPYTER_", "JPY_", "PYTEST_", "IPYTHON", "DASK_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *(
        "CLICOLOR",
        "FORCE_COLOR",
        "GIT_PAGER",
        "PAGER",
        "PYDEVD_",
        "KERNEL_",
        "JUPYTERLAB_",
    ),  # from a kernel, from a Lab
    *("HOME", "HF_HOME", "MPLCONFIGDIR", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES", "TERM", "SSH_", "XDG_"),
)
# What else a process has from the one that has started it: all of it is the mother's, so it must be the same.
INHERITED = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapEff", "CapBnd", "SigBlk", "Cpus_allowed", "Umask")
SPACES = ("mnt", "net", "pid", "user", "uts")  # hosts of a test
LIMITS = [getattr(resource, name) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
MAX_ENV = 1 << 16
MAX_FDS = 250
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")


def key_of(env, kind=kinds.ZYGOTE, options=()):
    """Names the mothers of a kind that live where this process does, and whose imports saw such an environment."""
    fixed = {name: value for name, value in env.items() if not name.startswith(FREE)}
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in SPACES]
    own = [status(INHERITED), os.getpriority(os.PRIO_PROCESS, 0), [resource.getrlimit(limit) for limit in LIMITS]]
    told = json.dumps([kind, *options, sys.executable, fixed, spaces, own], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def status(names):
    """These lines of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        rows = dict(line.split(":", 1) for line in file.read().splitlines())
    return {name: rows.get(name, "").strip() for name in names}


def be_forked(folder, kind, place):
    """Have it forked, and stand for it; returns when it must be started as usual."""
    options = sys.orig_argv[1:place]
    path = os.path.join(folder, f"{key_of(os.environ, kind, options)}.sock")
    fds = _descriptors()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if len(fds) > MAX_FDS:
        return
    if not _connects(connection, path) and not (_starts(path, kind, options) and _connects(connection, path)):
        return
    asked = {"env": dict(os.environ), "cwd": os.getcwd(), "fds": fds, "pid": os.getpid()}
    asked |= {"command": sys.orig_argv, "place": place, "path": sys.path[1:], "ignored": status(["SigIgn"])["SigIgn"]}
    told = json.dumps(asked).encode()
    with open(os.memfd_create("asked"), "w+b", closefd=True) as file:  # a packet has a limit
        file.write(told)
        file.flush()
        try:
            socket.send_fds(connection, [b"fork"], [file.fileno(), *fds])
            if not (pid := connection.recv(64)):
                return
        except OSError:
            return
    _stand_for(int(pid), connection, fds)


def _descriptors():
    """All that this process was started with."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
            found.append(int(name))
        except OSError:  # that of the list itself
            pass
    return found


def _stand_for(pid, connection, fds):
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, _: _pass_on(pid, number))
    for fd in fds:
        os.close(fd)
    try:
        status = int(connection.recv(64) or -signal.SIGKILL)
    except OSError:
        status = -signal.SIGKILL
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _pass_on(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _connects(connection, path):
    try:
        connection.connect(path)
    except OSError:
        return False
    return True


def _is_first_of(kind, folder):
    try:
        os.close(os.open(os.path.join(folder, f"{kind}.first"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError:
        return False
    return True


def _starts(path, kind, options):
    """Start a mother for processes like this one; whether there is one then.

    The first of a kind starts one at once: it is what most are like. Others do when they are the second of theirs.
    """
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return True
        is_first = not os.read(lock, 1)
        os.write(lock, b"1")
        if is_first and not _is_first_of(kind, os.path.dirname(path)):
            return False
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(64)
        env = {name: value for name, value in os.environ.items() if name != "LLMCLOUD_TEST_ID"}
        env["LLMCLOUD_TEST_PADDING"] = "." * MAX_ENV  # over which a fork's own environment is written
        mother = os.path.join(os.path.dirname(__file__), "mother.py")
        # By a shell that ends at once: nobody's child, since it outlives whoever is the first to need it.
        command = [
            "sh",
            "-c",
            '"$@" &',
            "sh",
            sys.executable,
            *options,
            mother,
            str(listener.fileno()),
            kind,
            "." * 4096,
        ]
        null, fds = subprocess.DEVNULL, [listener.fileno()]
        with open(f"{path}.log", "ab") as log:
            given = {"env": env, "cwd": "/", "stdin": null, "stdout": log, "stderr": log, "pass_fds": fds}
            subprocess.run(command, check=True, start_new_session=True, **given)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
