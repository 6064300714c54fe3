"""Runs that fail in many ways, for real: is the right cause named, and the right culprit?

Each class has several wordings, made by other calls and libraries than those that the rules were written after. A
failure is injected on one rank (or on all, where that is its nature), the others wait in a collective. Beside them,
runs that finish and runs that are stopped, of which nothing may be said. It holds when macro-F1 over the classes is at
least MIN_F1, the culprit is right in MIN_CULPRITS of the hangs, and no healthy or stopped run gets a verdict.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from jupyter_llmcloud.errors import LLMCloudError, NotFound
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from tests.support.worlds import AgentProcess, Ranks, Running, until

MIN_F1 = 0.95
MIN_CULPRITS = 0.95
HANG_AFTER_S = 0.6

SETUP = """
import ctypes, io, multiprocessing, os, pickle, resource, signal, socket, tempfile, time
import numpy, torch, torch.distributed as dist
from torch.nn import functional as F
import datetime
pair = dist.new_group([0, 1])
brief = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1.5))
"""
# Beside the culprit, the others wait for it.
ON_ONE = "if rank == {culprit}:\n    {body}\ndist.all_reduce(torch.ones(8))"
ON_ALL = "{body}"


@dataclass(frozen=True)
class Fault:
    """A class of failure: statements that bring it about on the culprit, or on all ranks; whether it has one."""

    cause: str
    bodies: tuple[str, ...]
    on_all: bool = False
    hangs: bool = False

    @property
    def template(self) -> str:
        return ON_ALL if self.on_all else ON_ONE


FAULTS = (
    Fault("host-out-of-memory", (
        "torch.empty(2**46)", "numpy.ones((2**23, 2**23))", "bytearray(2**46)", "torch.zeros(4).repeat(2**44)",
    )),
    Fault("killed", ("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGXCPU)")),
    Fault("native-crash", (
        "ctypes.string_at(0)", "os.abort()", "os.kill(os.getpid(), signal.SIGILL)", "ctypes.memset(8, 0, 8)",
    )),
    Fault("exited", ("os._exit(3)", "ctypes.CDLL(None)._exit(0)")),
    Fault("disk-full", (
        "open('/dev/full', 'w').write('x' * 10**6)", "torch.save(torch.ones(10**6), open('/dev/full', 'wb'))",
        "numpy.save(open('/dev/full', 'wb', buffering=0), numpy.ones(10**5))",
    )),
    Fault("too-many-files", (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); "
        "[os.pipe() for _ in range(99)]",
    )),
    Fault("collective-mismatch", (
        "dist.all_reduce(torch.ones(8 + 100 * rank))",
        "dist.all_reduce(torch.ones(4, dtype=torch.float64 if rank else torch.float32))",
    ), on_all=True),
    Fault("collective-timeout", (
        "dist.all_reduce(torch.ones(2), group=brief) if rank else time.sleep(4)",
        "dist.broadcast(torch.ones(2), 1, group=brief) if not rank else time.sleep(4)",
    ), on_all=True),
    Fault("index-out-of-range", (
        "F.embedding(torch.tensor([9]), torch.ones(4, 2))", "F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3]))",
        "torch.nn.EmbeddingBag(4, 2)(torch.tensor([[7]]))", "F.nll_loss(torch.ones(1, 2), torch.tensor([-5]))",
        "torch.arange(3)[torch.tensor([5])]", "numpy.arange(3)[7]",
    )),
    Fault("no-device", ("torch.ones(2).cuda()", "torch.cuda.set_device(3)")),
    Fault("address-in-use", (
        "s = socket.create_server(('127.0.0.1', 0)); socket.create_server(s.getsockname())",
        "s = socket.create_server(('127.0.0.1', 0)); __import__('http.server').server.HTTPServer(s.getsockname(), None)",
    )),
    Fault("name-not-found", (
        "socket.create_connection(('no.such.host.invalid', 80))",
        "import urllib.request; urllib.request.urlopen('http://no.such.host.invalid/')",
    )),
    Fault("download-failed", (
        "import httpx; httpx.get('http://127.0.0.1:9/')", "socket.create_connection(('127.0.0.1', 9))",
        "from transformers import AutoConfig; AutoConfig.from_pretrained('nobody/nothing-of-the-kind')",
    )),
    Fault("file-damaged", (
        "torch.load(io.BytesIO(b'PK' + bytes(100)))", "pickle.loads(b'\\x80\\x04nonsense')",
        "from safetensors.torch import load; load(b'\\xff' * 40)",
        "import pyarrow.parquet as p; p.read_table(io.BytesIO(b'no table at all, is it'))",
        "numpy.load(io.BytesIO(b'PK\\x03\\x04' + bytes(50)))",
    )),
    Fault("weights-mismatch", (
        "torch.nn.Linear(2, 2).load_state_dict({'weight': torch.ones(3, 3)})",
        "torch.nn.Linear(2, 2).load_state_dict({})",
        "o = torch.optim.SGD([torch.ones(1)], lr=1); "
        "o.load_state_dict(torch.optim.SGD([torch.ones(1), torch.ones(1)], lr=1).state_dict())",
    )),
    Fault("dtype-mismatch", (
        "torch.nn.Linear(2, 2)(torch.ones(2, dtype=torch.float64))", "torch.ones(2, 2) @ torch.ones(2, 2).long()",
        "F.cross_entropy(torch.ones(2, 3), torch.ones(2))", "torch.nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 2, 2).long())",
    )),
    Fault("shape-mismatch", (
        "torch.nn.Linear(4, 2)(torch.ones(3, 5))", "torch.ones(2) + torch.ones(3)", "torch.ones(6).view(4, 2)",
        "torch.cat([torch.ones(2, 3), torch.ones(3, 2)])", "torch.stack([torch.ones(2), torch.ones(3)])",
        "F.cross_entropy(torch.ones(4, 3), torch.zeros(3).long())", "torch.nn.Conv2d(3, 1, 1)(torch.ones(1, 1, 4, 4))",
        "numpy.ones(3) + numpy.ones(4)", "numpy.ones((2, 3)) @ numpy.ones((2, 3))",
        "torch.bmm(torch.ones(1, 2, 3), torch.ones(1, 2, 3))",
    )),
    Fault("not-finite", (
        "raise ValueError('the loss is nan, stopping')", "torch.multinomial(torch.tensor([float('nan'), 1.0]), 1)",
        "raise FloatingPointError('overflow')", "with torch.autograd.detect_anomaly():\n        "
        "x = torch.zeros(1, requires_grad=True); (x.sqrt() * 0).backward()",
    )),
    Fault("autograd", (
        "x = torch.ones(1, requires_grad=True); y = x * x; y.backward(); y.backward()",
        "x = torch.ones(1, requires_grad=True); y = x.exp(); y += 1; y.backward()",
        "torch.ones(1).sum().backward()", "x = torch.ones(1, requires_grad=True); x += 1",
    )),
    Fault("data-worker-died", (
        "list(torch.utils.data.DataLoader(range(4), num_workers=1, collate_fn=lambda b: os._exit(1)))",
        "list(torch.utils.data.DataLoader(range(4), num_workers=1, "
        "collate_fn=lambda b: os.kill(os.getpid(), signal.SIGKILL)))",
    )),
    Fault("not-picklable", (
        "pickle.dumps(lambda: 0)", "pickle.dumps(open('/dev/null'))", "dist.send_object_list([(x for x in ())], 1 - rank)",
        "pickle.dumps(__import__('threading').Lock())",
    )),
    Fault("package-missing", (
        "import surely_not_installed", "from torch import surely_not_there", "ctypes.CDLL('libsurelynot.so.3')",
    )),
    Fault("file-missing", (
        "open('/surely/not/there')", "os.listdir('/surely/not/there')", "torch.load('/surely/not/there.pt')",
        "numpy.load('/surely/not/there.npy')",
    )),
    Fault("not-permitted", ("open('/proc/sys/kernel/ostype', 'w').write('x')", "open('/sys/kernel/notes', 'w')")),
    Fault("code-error", ("undefined_name", "{}['key']", "1 / 0", "None.step()", "assert rank is None, 'not so'", "len(3)")),
    Fault("hang", ("time.sleep(1000)", "while True: pass", "signal.pause()", "input_ = os.read(os.pipe()[0], 1)"), hangs=True),
    Fault("deadlock", (
        "dist.recv(torch.ones(1), 1 - rank)",
        "dist.all_reduce(torch.ones(2), group=pair if rank else None)",
    ), on_all=True, hangs=True),
)  # fmt: skip

HEALTHY = (
    "print('warning: no space left is what this line is about')",
    "try:\n    torch.ones(2) + torch.ones(3)\nexcept RuntimeError as error:\n    print(error)",
    "dist.all_reduce(torch.ones(8))",
    "import warnings; warnings.warn('loss is nan', stacklevel=1)",
)
STOPPED = (
    "while True: time.sleep(0.01)",
    "while True: dist.all_reduce(torch.ones(100))",
    "print('CUDA out of memory', flush=True)\nwhile True: sum(range(1000))",
    "while True:\n    try:\n        torch.ones(2) + torch.ones(3)\n    except RuntimeError: pass",
)


def main(rounds: int = 1, num_clean: int = 100, seed: int = 0) -> bool:
    """Print the misses as they come, the score, and the verdicts on runs without a fault."""
    source = random.Random(seed)
    agent = AgentProcess()
    bench = _Bench(agent)
    try:
        for fault in FAULTS:
            for _ in range(rounds):
                for body in fault.bodies:
                    bench.inject(fault, body, source.randrange(2))
        false = sum(bench.clean(source.choice(HEALTHY), stop=False) for _ in range(num_clean))
        false += sum(bench.clean(source.choice(STOPPED), stop=True, source=source) for _ in range(num_clean))
    finally:
        bench.end()
        agent.end()
    f1, culprits = bench.macro_f1(), bench.hang_culprits()
    print(
        f"diagnose: {bench.num_faults} failures of {len({f.cause for f in FAULTS})} classes, macro-F1 {f1:.3f}, ",
        end="",
    )
    print(f"culprit right in {bench.culprits():.3f} of all and {culprits:.3f} of the hangs; ", end="")
    print(f"verdicts on {num_clean} healthy and {num_clean} stopped runs: {false}")
    return f1 >= MIN_F1 and culprits >= MIN_CULPRITS and not false


class _Bench:
    """Runs on one world, which is made anew when it is lost, and the score."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self._world = self._start()
        self._pairs: Counter[tuple[str, str]] = Counter()  # (true cause, told cause)
        self._culprits: dict[bool, list[bool]] = defaultdict(list)  # by whether it hung

    def _start(self) -> Ranks:
        world = Ranks(self._agent)
        world.ok(SETUP)
        return world

    def end(self) -> None:
        self._world.end()

    @property
    def num_faults(self) -> int:
        return sum(self._pairs.values())

    def inject(self, fault: Fault, body: str, culprit: int) -> None:
        record = self._run(fault.template.format(culprit=culprit, body=body), fault.hangs)
        told = record.diagnosis
        cause = str(told.get("cause", ""))
        self._pairs[(fault.cause, cause)] += 1
        if not fault.on_all:
            self._culprits[fault.hangs].append(told.get("ranks") == [culprit])
        if cause != fault.cause or (not fault.on_all and told.get("ranks") != [culprit]):
            errors = "; ".join(f"{row['rank']} {row['ename']}: {row['evalue'][:160]}" for row in record.errors)
            _missed(f"{fault.cause} of rank {culprit}, told {cause or 'nothing'} {told.get('ranks')}: {errors}")

    def clean(self, body: str, stop: bool, source: random.Random | None = None) -> int:
        """1 when something was said of a run that is well, or that somebody stopped."""
        running = self._world.send(body)
        if stop and source is not None:
            time.sleep(source.uniform(0, 0.3))  # the moment is the experiment
            with contextlib.suppress(NotFound):
                running.stop()
        record = running.end(60).folder.read()
        if record.diagnosis:
            _missed(f"a run that has {record.state}: {record.diagnosis}")
        return bool(record.diagnosis)

    def _run(self, code: str, hangs: bool) -> RunRecord:
        running = self._world.send(code, hang_after_s=HANG_AFTER_S) if hangs else self._world.send(code)
        if hangs:
            until(lambda: _has_hung(running), f"the hang is reported of {code}", 60)
            running.stop()
        folder = running.end(120).folder
        if not self._is_whole():
            self._world.end()
            self._world = self._start()
        return RunFolder(folder.path).read()

    def _is_whole(self) -> bool:
        """Whether both ranks are those of before, and can run a cell: the fault may have cost one, or spoilt it."""
        try:
            return (
                self._world.run(
                    "pair, F, resource\nopen('/dev/null').close()\ndist.barrier(pair); dist.barrier(brief)"
                ).state
                == "finished"
            )
        except LLMCloudError:
            return False

    def macro_f1(self) -> float:
        scores = []
        for cause in {fault.cause for fault in FAULTS}:
            right = self._pairs[(cause, cause)]
            told = sum(number for (_, named), number in self._pairs.items() if named == cause)
            true = sum(number for (real, _), number in self._pairs.items() if real == cause)
            scores.append(2 * right / (told + true))
        return statistics.mean(scores)

    def hang_culprits(self) -> float:
        return statistics.mean(self._culprits[True])

    def culprits(self) -> float:
        return statistics.mean([*self._culprits[True], *self._culprits[False]])


def _missed(what: str) -> None:
    print(f"  missed: {what}", flush=True)


def _has_hung(running: Running) -> bool:
    with contextlib.suppress(NotFound):
        return bool(running.outcome.folder.read().hang)
    return False
