"""Why a run has failed, from what is left of it."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.core.detect.diagnosis import Diagnosis, Evidence, diagnose


def failed(*errors: dict[str, Any], **evidence: Any) -> Diagnosis | None:
    return diagnose(Evidence("failed", errors, **evidence))


def error(ename: str, evalue: str, rank: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "ename": ename, "evalue": evalue, **more}


def echo(rank: int, text: str = "Connection closed by peer [127.0.0.1]:40112") -> dict[str, Any]:
    return error("RuntimeError", f"[../gloo/transport/tcp/pair.cc:537] {text}", rank, collateral=True)


EXCEPTIONS = [
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB",
     "device-out-of-memory"),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "device-out-of-memory"),
    ("RuntimeError", "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
     "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)", "host-out-of-memory"),
    ("MemoryError", "", "host-out-of-memory"),
    ("OSError", "[Errno 28] No space left on device", "disk-full"),
    ("RuntimeError", "[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0: file write failed", "disk-full"),
    ("RuntimeError", "unable to allocate shared memory(shm) for file </torch_4>: No space left on device (28)",
     "shared-memory-full"),
    ("OSError", "[Errno 24] Too many open files: '/data/shard-1.parquet'", "too-many-files"),
    ("RuntimeError", "can't start new thread", "too-many-processes"),
    ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", "device-fault"),
    ("RuntimeError", "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later",
     "index-out-of-range"),
    ("IndexError", "index out of range in self", "index-out-of-range"),
    ("IndexError", "Target 10 is out of bounds.", "index-out-of-range"),
    ("RuntimeError", "CUDA error: no kernel image is available for execution on the device", "driver-mismatch"),
    ("AssertionError", "Torch not compiled with CUDA enabled", "no-device"),
    ("ValueError", "Process group <torch.distributed.distributed_c10d.ProcessGroup object at 0x7f> is not initialized in the "
     "world group map. Please initialize the group first.", "group-ended"),
    ("RuntimeError", "Expected to have finished reduction in the prior iteration before starting a new one.",
     "collective-mismatch"),
    ("DistBackendError", "NCCL error: ncclInvalidUsage. Duplicate GPU detected : rank 1 and rank 0 both on CUDA device",
     "nccl-setup"),
    ("OSError", "[Errno 98] Address already in use", "address-in-use"),
    ("gaierror", "[Errno -2] Name or service not known", "name-not-found"),
    ("GatedRepoError", "401 Client Error. Cannot access gated repo for url", "download-refused"),
    ("ClientError", "An error occurred (InvalidAccessKeyId) when calling the GetObject operation", "download-refused"),
    ("ConnectionError", "HTTPSConnectionPool(host='huggingface.co'): Max retries exceeded with url", "download-failed"),
    ("SafetensorError", "Error while deserializing header: header too large", "file-damaged"),
    ("RuntimeError", "PytorchStreamReader failed reading zip archive: failed finding central directory", "file-damaged"),
    ("RuntimeError", "Error(s) in loading state_dict for Net:\n\tsize mismatch for 0.weight", "weights-mismatch"),
    ("RuntimeError", "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
     "device-mismatch"),
    ("RuntimeError", "expected m1 and m2 to have the same dtype, but got: double != float", "dtype-mismatch"),
    ("RuntimeError", "aten.copy_.default got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor"
     " before calling distributed operators!", "cut-beside-whole"),
    ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied (4x10 and 12x1)", "shape-mismatch"),
    ("RuntimeError", "The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 0",
     "shape-mismatch"),
    ("ValueError", "Expected input batch_size (4) to match target batch_size (3).", "shape-mismatch"),
    ("RuntimeError", "Function 'LogBackward0' returned nan values in its 0th output.", "not-finite"),
    ("ValueError", "loss became NaN at step 12", "not-finite"),
    ("RuntimeError", "einsum(): subscript j has size 2 for operand 1 which does not broadcast with previously seen size 3",
     "shape-mismatch"),
    ("RuntimeError", "input.size(-1) must be equal to input_size. Expected 3, got 5", "shape-mismatch"),
    ("ValueError", "Using a target size (torch.Size([2])) that is different to the input size (torch.Size([2, 1])) is"
     " deprecated.", "shape-mismatch"),
    ("RuntimeError", "index_add_(): self (Float) and source (Double) must have the same scalar type", "dtype-mismatch"),
    ("RuntimeError", "where expected condition to be a boolean tensor, but got a tensor with dtype Float",
     "dtype-mismatch"),
    ("RuntimeError", "Class values must be smaller than num_classes.", "index-out-of-range"),
    ("JSONDecodeError", "Expecting value: line 1 column 7 (char 6)", "file-damaged"),
    ("RuntimeError", "grad can be implicitly created only for scalar outputs", "autograd"),
    ("RuntimeError", "Trying to backward through the graph a second time", "autograd"),
    ("RuntimeError", "DataLoader worker (pid(s) 4711) exited unexpectedly", "data-worker-died"),
    ("AttributeError", "Can't pickle local object 'train.<locals>.collate'", "not-picklable"),
    ("ModuleNotFoundError", "No module named 'datasets'", "package-missing"),
    ("FileNotFoundError", "[Errno 2] No such file or directory: '/data/train.txt'", "file-missing"),
    ("PermissionError", "[Errno 13] Permission denied: '/data'", "not-permitted"),
    ("NameError", "name 'lossfn' is not defined", "code-error"),
    ("KeyError", "'labels'", "code-error"),
    ("DistStoreError", "Timed out after 601 seconds waiting for clients. 1/2 clients joined.", "collective-timeout"),
    ("RuntimeError", "DataLoader worker (pid 11) is killed by signal: Bus error. It is possible that dataloader's workers "
     "are out of shared memory.", "shared-memory-full"),
    ("RuntimeError", "unable to mmap 560 bytes from file </torch_12_0>: Cannot allocate memory (12)", "shared-memory-full"),
    ("RuntimeError", "unable to open shared memory object </torch_3> in read-write mode: Too many open files (24)",
     "too-many-files"),
    ("OSError", "[Errno 116] Stale file handle: '/home/a/cache'", "storage-failed"),
    ("OSError", "[Errno 5] Input/output error: '/media/a.pkl'", "storage-failed"),
    ("ReadTimeout", "HTTPSConnectionPool(host='a.example', port=443): Read timed out.", "download-failed"),
    ("URLError", "<urlopen error [Errno -2] Name or service not known>", "name-not-found"),
    ("URLError", "<urlopen error [Errno 110] Connection timed out>", "download-failed"),
    ("ConnectionError", "HTTPSConnectionPool(host='a.example', port=443): Max retries exceeded with url: / (Caused by "
     "NewConnectionError('[Errno 101] Network is unreachable'))", "download-failed"),
    ("OSError", "org/model is not a local folder and is not a valid model identifier listed on the hub", "file-missing"),
    ("OSError", "./out does not appear to have a file named config.json.", "file-missing"),
    ("EntryNotFoundError", "404 Client Error. Entry Not Found for url: https://a.example/model.safetensors", "file-missing"),
    ("CheckpointException", "ranks:dict_keys([0])\nRuntimeError: Missing key in checkpoint state_dict: 2.weight.",
     "weights-mismatch"),
    ("ValueError", "Trying to set a tensor of shape torch.Size([3, 4]) in 'weight' (which has shape torch.Size([5, 4]))",
     "weights-mismatch"),
    ("Exception", "data did not match any variant of untagged enum ModelWrapper at line 25 column 3", "file-damaged"),
    ("ValueError", "Couldn't instantiate the backend tokenizer. You need to have sentencepiece installed", "package-missing"),
    ("RuntimeError", "Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False.",
     "no-device"),
    ("RuntimeError", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "device-fault"),
    ("TypeError", "can't convert cuda:0 device type tensor to numpy.", "device-mismatch"),
    ("RuntimeError", "DDP expects same model across all ranks, but Rank 0 has 12 params", "collective-mismatch"),
    ("DistNetworkError", "Failed to recv, got 0 bytes. Connection was likely closed.", "connection-lost"),
    ("RuntimeError", "NPU out of memory. Tried to allocate 2.00 GiB", "device-out-of-memory"),
    ("XlaRuntimeError", "RESOURCE_EXHAUSTED: Failed to allocate request for 2.25GiB on device ordinal 0",
     "device-out-of-memory"),
    ("OutOfMemoryError", "Task was killed due to the node running low on memory.", "host-out-of-memory"),
    ("RuntimeError", "mmap can't allocate", "host-out-of-memory"),
    ("CommClosedError", "in <TCP (closed) Worker->Scheduler local=tcp://10.1.0.4:41232>: Stream is closed",
     "connection-lost"),
    ("OSError", "Timed out trying to connect to tcp://10.2.12.2:43394 after 30 s", "connection-lost"),
    ("RuntimeError", "NCCL Error 3: internal error - please report this issue", "nccl-setup"),
    ("RuntimeError", "[device.cc:83] ifa != nullptr. Unable to find interface for: [10.1.2.3]", "name-not-found"),
    ("ConnectionError", "Tried to launch distributed communication on port `29500`, but another process is utilizing it.",
     "address-in-use"),
    ("OSError", "Consistency check failed: file should be of size 49 but has size 10 (model.safetensors).", "file-damaged"),
    ("OSError", "Incorrect path_or_model_id: './m'. Please provide either the path to a local folder or the repo_id of a "
     "model on the Hub.", "file-missing"),
    ("RuntimeError", "Error building extension 'cpu_adam'", "build-failed"),
    ("OSError", "CUDA_HOME environment variable is not set. Please set it to your CUDA install root.", "build-failed"),
    ("RuntimeError", "FlashAttention only supports Ampere GPUs or newer.", "driver-mismatch"),
    ("ValueError", "The checkpoint has model type `q9` but Transformers does not recognize this architecture.",
     "package-missing"),
    ("RuntimeError", "Numpy is not available", "package-missing"),
    ("ValueError", "Must flatten tensors with uniform dtype but got torch.bfloat16 and torch.float32", "dtype-mismatch"),
    ("Exception", "Current loss scale already at minimum - cannot decrease scale anymore.", "not-finite"),
    ("RuntimeError", "Expected to mark a variable ready only once.", "autograd"),
    ("ConnectionClosedError", 'Connection was closed before we received a valid response from endpoint URL: "https://b"',
     "download-failed"),
    ("DistNetworkError", "The client socket has failed to connect to any network address of (a, 29500). The client socket "
     "has failed to connect to a:29500 (errno: 111 - Connection refused).", "connection-lost"),
    ("DistNetworkError", "The client socket has failed to connect to any network address of (trainer-0, 1). The IPv6 network "
     "addresses cannot be retrieved (gai error: -2 - Name or service not known).", "name-not-found"),
    ("RuntimeError", "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor) should be the same",
     "dtype-mismatch"),
    ("RuntimeError", "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
     "device-mismatch"),
    ("RuntimeError", "Failed to initialize NVML: Driver/library version mismatch", "driver-mismatch"),
    ("RuntimeError", "Failed to allocate memory for tensor: cudaMalloc failed: out of memory", "device-out-of-memory"),
    ("InductorError", "InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx: (None, 'g++')", "build-failed"),
    ("InductorError", "CppCompileError: C++ compile error\nOutput:\nfatal error: Python.h: No such file or directory",
     "build-failed"),
    ("TypeError", "Descriptors cannot be created directly. It must be regenerated with protoc >= 3.19.0.", "package-missing"),
    ("HTTPError", "HTTP Error 503: Service Unavailable", "download-failed"),
    ("RuntimeError", "Distributed package doesn't have NCCL built in", "nccl-setup"),
    ("LocalTokenNotFoundError", "Token is required (`token=True`), but no token found.", "download-refused"),
]  # fmt: skip


@pytest.mark.parametrize(("ename", "evalue", "cause"), EXCEPTIONS, ids=lambda value: str(value)[:40])
def test_the_text_of_an_exception_tells_the_cause(ename: str, evalue: str, cause: str) -> None:
    found = failed(error(ename, evalue), echo(0))
    assert found is not None
    assert (found.cause, found.ranks) == (cause, (1,))
    assert found.sentence[0].isupper()
    assert found.action


@pytest.mark.parametrize(
    ("ename", "evalue"),
    [
        ("Surprise", "the moon is full"),
        ("RuntimeError", "internal assert"),
        ("RuntimeError", "validation loss nan-guard disabled by configuration"),
        ("ValueError", "could not decide"),
        ("ValueError", "the type of the run is not supported here"),
        ("ValueError", "the quota of rows is exceeded"),
        ("RuntimeError", "timeout in the game after 5 moves"),
        ("ValueError", "pip is not a unit that I know"),
        ("ValueError", "the limit of memory cells must be positive"),
        ("RuntimeError", "tokens exceed the memory of the agent"),
        ("RuntimeError", "no port was given for the agent"),
        ("ValueError", "this strategy requires at least 2 stages"),
        ("RuntimeError", "environment reset before connecting the actor"),
        ("ValueError", "compute capability of the team is low"),
        ("ValueError", "the graph has 3 nodes that are lost"),
        ("ValueError", "hash of the config does not match"),
        ("Exception", "early stop: time limit of the game"),
        ("ValueError", "optimizer got an empty parameter list"),
    ],
)
def test_what_no_rule_knows_stays_unknown(ename: str, evalue: str) -> None:
    assert failed(error(ename, evalue)) is None
    assert failed(error(ename, evalue), echo(0)) is None, "the lost connection of the other rank comes of it"


@pytest.mark.parametrize("state", ["finished", "stopped", "running"])
def test_a_run_that_has_not_failed_has_no_cause(state: str) -> None:
    stopped = error("KeyboardInterrupt", "", 0, interrupted=True)
    assert diagnose(Evidence(state, [stopped, echo(1)])) is None


def test_all_ranks_with_the_same_error_are_named() -> None:
    found = failed(
        *[error("NameError", "name 'x' is not defined", rank, place="cell [3], line 2") for rank in (0, 1, 2)]
    )
    assert found is not None
    assert (found.ranks, found.is_told) == ((0, 1, 2), True)
    assert found.sentence == "Ranks 0-2 raised NameError: name 'x' is not defined at cell [3], line 2."


def test_a_script_that_lacks_its_arguments_is_told_how_to_get_them() -> None:
    left = error("SystemExit", "2", 0, traceback=["File python3.11/argparse.py:2617, in exit(self, status)"])
    found = failed(left)
    assert found is not None
    assert (found.cause, found.ranks) == ("arguments", (0,))
    assert "--args" in found.action
    assert failed(error("SystemExit", "2", 0, traceback=["Cell In[3], line 2"])) is None


def test_the_first_own_error_counts_and_not_what_it_made_in_others() -> None:
    found = failed(echo(0), error("OSError", "[Errno 28] No space left on device", 2), echo(1))
    assert found is not None
    assert (found.cause, found.ranks) == ("disk-full", (2,))


def test_what_was_seen_of_a_process_comes_before_exceptions() -> None:
    killed = error("RankKilled", "the process was ended by SIGSEGV (-11). A native library crashed.", 3)
    found = failed(error("ValueError", "loss is nan", 0), killed)
    assert found is not None
    assert (found.cause, found.ranks) == ("native-crash", (3,))


@pytest.mark.parametrize(
    ("ename", "text", "cause"),
    [
        ("RankOutOfMemory", "the process was ended by SIGKILL (-9). The kernel's out-of-memory killer", "host-out-of-memory"),
        ("RankLost", "The node agent of 10.0.0.2 is gone.", "host-lost"),
        ("RankKilled", "the process was ended by SIGKILL (-9). Somebody killed it.", "killed"),
        ("RankKilled", "the process was ended by SIGBUS (-7). Usually shared memory", "shared-memory-full"),
        ("RankExited", "the process ended by itself with exit code 3.", "exited"),
    ],
)  # fmt: skip
def test_how_a_process_ended_tells_the_cause(ename: str, text: str, cause: str) -> None:
    found = failed(error(ename, text), echo(0))
    assert found is not None
    assert (found.cause, found.ranks) == (cause, (1,))


def test_the_last_lines_of_a_process_that_gave_up_say_why() -> None:
    aborted = error("RankKilled", "the process was ended by SIGABRT (-6). A native library gave up.", 0)
    log = "step 3\n[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 600000 milliseconds\n"
    found = failed(aborted, logs={0: log})
    assert found is not None
    assert found.cause == "collective-timeout"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("srun: error: gpu-a-014: task 3: Out Of Memory", "host-out-of-memory"),
        ("=>> PBS: job killed: mem 67371008kb exceeded limit 67108864kb", "host-out-of-memory"),
        ("TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.", "host-out-of-memory"),
        ("kernel: Out of memory: Killed process 22183 (python3) total-vm:190283kB", "host-out-of-memory"),
        ("[Rank 1] Some NCCL operations have failed or timed out. Due to the", "collective-timeout"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=11.0.", "host-out-of-memory"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 20Gi.", "disk-full"),
        ("TERM_RUNLIMIT: job killed after reaching LSF run time limit.", "time-limit"),
        (
            "[4] ib_plugin.c:1615 NCCL WARN NET/IB : Got completion from peer 10.2.2.2<5486> with status=12",
            "connection-lost",
        ),
        ("*** JOB 55 ON n1 CANCELLED AT 2026-02-02 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***", "host-lost"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_the_last_lines_of_a_process_that_was_ended_say_who_did_it(log: str, cause: str) -> None:
    found = failed(error("RankKilled", "the process was ended by SIGTERM (-15).", 0), logs={0: f"step 3\n{log}\n"})
    assert found is not None
    assert found.cause == cause


def test_what_a_program_prints_itself_is_no_sign() -> None:
    aborted = error("RankKilled", "the process was ended by SIGKILL (-9).", 0)
    found = failed(aborted, logs={0: "mat1 and mat2 shapes cannot be multiplied\nPermissionError was handled\n"})
    assert found is not None
    assert found.cause == "killed"


def test_a_run_that_is_stopped_while_it_hangs_names_who_is_missing() -> None:
    hang = {"text": "rank 2 is late: at cell [4], line 9 for 61 s; ranks 0-1 wait in all_reduce #7. Press Stop to "
            "interrupt, or wait.", "late": [2], "waiting": [0, 1]}  # fmt: skip
    found = diagnose(Evidence("stopped", [error("KeyboardInterrupt", "", 0)], hang))
    assert found is not None
    assert (found.cause, found.ranks) == ("hang", (2,))
    assert found.sentence == (
        "The run hung: rank 2 is late: at cell [4], line 9 for 61 s; ranks 0-1 wait in all_reduce #7."
    )
    assert diagnose(Evidence("stopped", [], {**hang, "recovered": True})) is None


def test_ranks_that_wait_for_each_other_are_a_deadlock() -> None:
    hang = {"text": "the ranks wait for each other and cannot go on: rank 0 waits in recv; rank 1 waits in recv.",
            "late": [], "waiting": [0, 1]}  # fmt: skip
    found = diagnose(Evidence("stopped", [], hang))
    assert found is not None
    assert (found.cause, found.ranks) == ("deadlock", (0, 1))


def test_with_nothing_but_echoes_the_peer_is_named() -> None:
    found = failed(echo(0), echo(1, "Connection reset by peer [10.0.0.7]:5511"))
    assert found is not None
    assert (found.cause, found.ranks) == ("connection-lost", ())
    assert "10.0.0.7" in found.sentence


def test_ranks_that_meet_with_other_shapes_are_told_from_a_lost_connection() -> None:
    text = "[enforce fail at /gloo/transport/tcp/pair.cc:444] op.preamble.length <= op.nbytes. 40 vs 20"
    found = failed(error("RuntimeError", text, 1, collateral=True), echo(0))
    assert found is not None
    assert (found.cause, found.ranks) == ("collective-mismatch", ())
