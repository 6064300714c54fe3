"""What the texts of errors mean: ordered rules, the narrower ones first.

A rule reads one text: `name of the exception: its message`, or the last lines that a process wrote before it was ended.
It looks for what a library says in any version of a message (an error number, the name of a status, the shape of a
sentence), not for a whole message. What no rule knows stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """A cause by its short name, what has happened in one sentence, and what to do about it."""

    cause: str
    sentence: str
    action: str


@dataclass(frozen=True)
class TextRule:
    """A cause that is known by a text.

    Attributes:
        pattern: somewhere in the text. Its named groups can be used in `sentence`.
        sentence: what has happened, with `{who}` for the ranks.
        native: whether libraries write this to the log of a process that they end, without an exception.
    """

    cause: str
    pattern: re.Pattern[str]
    sentence: str
    action: str
    native: bool = False

    def read(self, text: str, who: str) -> Meaning | None:
        """What the text means; None where the rule does not know it."""
        found = self.pattern.search(text)
        if found is None:
            return None
        words = {name: (word or "").strip() for name, word in found.groupdict().items()}
        return Meaning(self.cause, self.sentence.format(who=who, **words), self.action)


def _rule(cause: str, pattern: str, sentence: str, action: str, native: bool = False) -> TextRule:
    return TextRule(cause, re.compile(pattern, re.IGNORECASE | re.DOTALL), sentence, action, native)


_SMALLER = (
    "Use a smaller batch with gradient accumulation, activation checkpointing, a lower precision, or --plan fsdp."
)
_LESS_MEMORY = "Use a smaller batch, fewer ranks or data loader workers on this host, or a host with more memory."
_SAME_CALLS = (
    "Let every rank reach the same collectives in the same order: no `if rank == 0:` around them, and batches of the "
    "same number and shape on each."
)
_NETWORK = "Look at the network between the hosts (firewall, interface, cable), then run again from the checkpoint."

TEXT_RULES: tuple[TextRule, ...] = (
    # --- memory ---
    _rule(
        "host-out-of-memory",
        r"\d (oom[_-]?kill|out.of.memory) event|\boom[- _]?killed\b|out[- ]of[- ]memory (killer|handler)"
        r"|cgroup out of memory|out of memory: killed process"
        r"|task \d+: out of memory|node was low on resource: memory"
        r"|job killed: \w*mem\b.{0,60}limit|\bTERM_(MEM|SWAP)LIMIT\b",
        "{who} was ended for the memory that it used on its host.",
        _LESS_MEMORY,
        native=True,
    ),
    _rule(
        "device-out-of-memory",
        r"\b(cuda(malloc\w*)?|hip(malloc\w*)?|xpu|mps|npu|tpu|gpu|device)\b.{0,40}out of memory"
        r"|RESOURCE_EXHAUSTED: .{0,80}(memory|allocat)"
        r"|exceed\w* (the )?(allowed|device|gpu) memory|OUT_OF_(DEVICE_MEMORY|RESOURCES)\b|DEVICE_ALLOCATION_FAILED"
        r"|\bcu(da|blas|dnn)\w*\b.{0,40}(\b[mc]alloc|allocation fail)|\bOOM when allocating .{0,200}\b(gpu|cuda)"
        r"|out of memory .{0,20}\ballocat.{0,60}\bgpu"
        r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
        r"|(torch\.|^)OutOfMemoryError: (?!.*(DefaultCPUAllocator|\bnode\b))",
        "{who} ran out of memory on the device.",
        _SMALLER,
        native=True,
    ),
    _rule(
        "too-many-files",
        r"too many open files|\[Errno 2[34]\]|received 0 items of ancdata|\bEMFILE\b",
        "{who} opened more files than its process may.",
        "Raise the limit (ulimit -n), use fewer num_workers, or "
        "torch.multiprocessing.set_sharing_strategy('file_system').",
    ),
    _rule(
        "shared-memory-full",
        r"insufficient shared memory|bus error.{0,80}(shm|shared memory)"
        r"|unable to (open|allocate|resize|mmap) shared memory"
        r"|</torch_\w+>.{0,40}(no space left|cannot allocate|temporarily unavailable)"
        r"|/dev/shm.{0,120}(no space left|errno 28)|(no space left|errno 28).{0,120}/dev/shm|torch_shm_manager",
        "{who} found no room in shared memory (/dev/shm), which data loader workers pass batches through.",
        "Give the host or container more shared memory (--shm-size), or use fewer num_workers.",
        native=True,
    ),
    _rule(
        "host-out-of-memory",
        r"DefaultCPUAllocator.{0,60}(can't|cannot|not enough|failed)|^MemoryError\b|_ArrayMemoryError|std::bad_alloc"
        r"|can(not|'t) allocate|\bOOM when allocating|\[Errno 12\]|\bENOMEM\b|unable to allocate [\d.]+ ?[KMGT]i?B"
        r"|paging file is too small|posix_memalign|ArrowMemoryError|malloc of size \d+ failed"
        r"|memory allocation of \d+ bytes failed",
        "{who} ran out of memory on the host.",
        _LESS_MEMORY,
        native=True,
    ),
    _rule(
        "host-out-of-memory",
        r"(exceed|over|above|reach)\w* .{0,30}\bmemory (limit|budget|quota|usage threshold)"
        r"|running low on memory|out of host memory|\bMemoryLimitExceeded",
        "{who} ran out of memory on the host.",
        _LESS_MEMORY,
    ),
    # --- disks and files ---
    _rule(
        "disk-full",
        r"no space left on device|\[Errno 28\]|disk quota exceeded|\[Errno 122\]|\bENOSPC\b|file write failed"
        r"|unexpected pos \d+ vs|not enough (free )?(disk )?space|iostream error|disk is full"
        r"|ephemeral.{0,10} storage",
        "{who} could not write: a disk or its quota is full.",
        "Free space or set another folder, then run again; what was checkpointed is kept.",
        native=True,
    ),
    _rule(
        "too-many-processes",
        r"can't start new thread|resource temporarily unavailable|\[Errno 11\] .*(fork|thread|process)"
        r"|pthread_create failed|libgomp: thread creation failed",
        "{who} may not start more threads or processes.",
        "Use fewer num_workers or ranks on this host, or raise the limit of processes (ulimit -u, pids.max).",
        native=True,
    ),
    _rule(
        "storage-failed",
        r"\[Errno (5|103|107|108|116|121)\] [^:]*: ['\"b]|\[Errno 116\]|stale (nfs )?file handle|^OSError: \[Errno 5\]"
        r"|(remote|disk) I/O error|\b(EIO|ESTALE)\b|no locks available",
        "The storage that {who} read or wrote has failed: a mount that is gone, or a disk.",
        "Look at the mounts of the worker's host (dmesg, df), then run again from the checkpoint.",
        native=True,
    ),
    # --- accelerators ---
    _rule(
        "device-fault",
        r"uncorrectable (ecc|nvlink)|ECC error|fallen off the bus|\bgpu (is|has been|was) lost"
        r"|\bXid\b|cudaErrorECC|hardware error.{0,40}(gpu|cuda)"
        r"|unspecified launch failure",
        "The device of {who} reported a fault of its hardware.",
        "Take this host or device out of the cluster, then run again from the checkpoint.",
        native=True,
    ),
    _rule(
        "index-out-of-range",
        r"device-side assert|index out of range in self|target -?\d+ is out of bounds|indexSelect\w*.{0,60}assert"
        r"|index -?\d+ is out of bounds for (dimension|axis)"
        r"|takes value -?\d+ which is not in the valid range|`t >= 0 && t < n_classes`|tried to access index"
        r"|class values must be (smaller|non-negative)"
        r"|(index|indices) .{0,40}out of (bounds|range) for (dimension|axis|tensor)"
        r"|exceeds dimension size|target out of range",
        "{who} used an index outside a table: a token or class that the model or loss does not have.",
        "Compare the largest label or token id with the number of classes, or with the rows of the embedding.",
    ),
    _rule(
        "driver-mismatch",
        r"no kernel image is available|driver version is insufficient|forward compatibility was attempted"
        r"|driver/library version mismatch"
        r"|cudaErrorInsufficientDriver|cuda driver initialization failed|nvidia driver on your system is too old"
        r"|driver.{0,30}does not support this cuda|unsupported toolchain|compiled with different cuda"
        r"|STATUS_ARCH_MISMATCH"
        r"|cuda version \S+ does not match|(requires?|supports?|only) .{0,40}\b(sm_?\d\d|compute capability"
        r"|\w+ gpus or newer)"
        r"|not compatible with the current pytorch|cudaGetDeviceCount(?!.*no (cuda-capable )?(device|gpu))",
        "The build of torch on the host of {who} does not fit its device or driver.",
        "Install a torch build for this device and driver on that host.",
    ),
    _rule(
        "no-device",
        r"no (cuda|hip) gpus are available|torch not compiled with cuda|found no nvidia driver"
        r"|invalid device ordinal|no attribute '_cuda_|deserialize object on (a )?(cuda|hip|xpu|mps)"
        r"|busy or unavailable|no gpus found|requires an? gpu\b|no cuda-capable device|NVML (shared )?library"
        r"|only supported with gpus"
        r"|setup doesn't support (bf16|fp16|tf32)",
        "{who} asked for a device that its host does not have, or that it was not given.",
        "Ask for workers with devices, or leave the device to Accelerate (accelerator.device).",
    ),
    _rule(
        "device-fault",
        r"illegal memory access|misaligned address|CUDA error: an illegal instruction",
        "A kernel on the device of {who} touched memory that is not its own.",
        "Run again with CUDA_LAUNCH_BLOCKING=1 to see which operation it was.",
        native=True,
    ),
    _rule(
        "device-fault",
        r"CU(DNN|BLAS|SPARSE|SOLVER|FFT)_STATUS_\w+",
        "A library on the device of {who} failed: often its memory was used up, or an index was outside a table.",
        "Run again with CUDA_LAUNCH_BLOCKING=1 and a smaller batch to see which operation it was.",
        native=True,
    ),
    # --- collectives ---
    _rule(
        "group-ended",
        r"is not initialized in the world group map|is not registered, please create group with"
        r"|could not resolve the process group|invalid process group specified",
        "{who} used a process group, or a model on one, that has ended with the ranks that it was made for.",
        "Run the cell again that makes the group, or wraps the model.",
    ),
    _rule(
        "collective-mismatch",
        r"mismatch between collectives|preamble\.length|op\.preamble|collectives? (differ|mismatch)"
        r"|ranks? .{0,40}different (collective|shape|number of (bytes|elements))|sizes? .{0,30}(differ"
        r"|mismatch).{0,30}(across|between|on) ranks"
        r"|ncclInvalidArgument.{0,80}(count|datatype)|unused or unexpected collective"
        r"|same model across all ranks|across all (ranks|processes).{0,80}inconsistent"
        r"|params\[\d+\] in this process"
        r"|received data size doesn't match|\[enforce fail at .{0,80}gloo",
        "The ranks met in one collective with different operations, shapes or types.",
        _SAME_CALLS,
        native=True,
    ),
    _rule(
        "collective-mismatch",
        r"expected to have finished reduction in the prior iteration"
        r"|parameters? (that )?(were|was) not used in producing|training graph has changed in this iteration",
        "Some parameters of {who} got no gradient, so that DistributedDataParallel waits for them.",
        "Use all parameters in each forward pass, or DistributedDataParallelKwargs(find_unused_parameters=True).",
    ),
    _rule(
        "collective-timeout",
        r"watchdog caught collective|collective (operation )?time-?out|time-?out (while )?waiting for (key|rank)"
        r"|timed out waiting \d+ ?ms|ran for \d+ milliseconds"
        r"|nccl operations? (has|have) (failed or )?timed out|timeout\(ms\)=|wait(ing)? timeout after \d+ ?ms"
        r"|Socket Timeout|monitoredBarrier|timed out initializing process group"
        r"|timed out after \d+ ?(s|ms|seconds|milliseconds)\b.{0,60}(client|rank|joined|store)",
        "A collective of {who} was not entered by all ranks in time.",
        _SAME_CALLS,
        native=True,
    ),
    _rule(
        "nccl-setup",
        r"duplicate gpu detected|n't have nccl built in|ncclInvalidUsage|ncclUnhandledCudaError|ncclSystemError"
        r"|unhandled system error"
        r"|no socket interface found|NCCL_SOCKET_IFNAME|bootstrap : no|NCCL WARN .{0,40}NET/(?!.{0,20}got completion)",
        "NCCL could not set up its connections for {who}.",
        "Give each rank a device of its own, name the interface (NCCL_SOCKET_IFNAME), and read NCCL_DEBUG=INFO.",
        native=True,
    ),
    _rule(
        "nccl-setup",
        r"\bNCCL error\b(?!.*(ncclRemoteError|aborted|network error))",
        "NCCL could not do its work for {who}.",
        "Read what it says with NCCL_DEBUG=INFO, and use the same driver and NCCL on all hosts.",
        native=True,
    ),
    _rule(
        "name-not-found",
        r"unable to find (an? )?(interface|address) for|no (network )?interface (found )?for",
        "{who} found no network interface for its address or name.",
        "Name the interface (GLOO_SOCKET_IFNAME), or mend what the host calls itself (hostname, /etc/hosts).",
        native=True,
    ),
    _rule(
        "download-failed",
        r"^(?!.*(name resolution|failed to resolve|getaddrinfo|name or service|nodename nor)).*(<urlopen error"
        r"|ChunkedEncodingError|RemoteDisconnected|RemoteProtocolError"
        r"|IncompleteRead|EndpointConnectionError|client has been closed|HTTPS?ConnectionPool\("
        r"|\b429\b.{0,40}(client error|too many)|too many requests.{0,20}for url|endpoint url\b"
        r"|\bSlowDown\b|reduce your request rate|rate limit (was |is )?(exceeded|reached)|HTTP status (server"
        r"|client) error)",
        "{who} could not reach a server that it wanted something from, or was sent away by it.",
        "Check the network of the worker's host, or put the files on storage that it sees and name that path.",
    ),
    _rule(
        "connection-lost",
        r"ncclRemoteError|remote process exited or there was a network error|connection (was )?(closed|reset) by"
        r"|broken ?pipe|\[Errno (32|104|110|113)\]|no route to host|network is unreachable|socket closed|peer closed"
        r"|connection timed out|ECONNRESET|EPIPE|failed to recv, got|connection was likely closed|socket has timed out"
        r"|CommClosedError|stream is closed|timed out .{0,30}\bconnect|\bconnect\w*(\(\))? timed out"
        r"|connectFullMesh failed|got completion (from peer|with error)"
        r"|client socket has (failed|timed out)(?!.*(gai ?error|name or service|name resolution))"
        r"|connection to the .{0,20}store (has )?failed|lost (the )?connection to|heartbeat timeout",
        "The connection of {who} to another process was lost.",
        _NETWORK,
        native=True,
    ),
    _rule(
        "address-in-use",
        r"address already in use|\[Errno 98\]|EADDRINUSE|only one usage of each socket address"
        r"|\bport\b.{0,80}(already (taken|in use|used|bound|occupied|allocated)|is (in use|occupied)|another process)",
        "{who} wanted a port that another process has.",
        "Let the port be chosen (port 0), and leave MASTER_PORT and init_process_group to the ranks.",
    ),
    _rule(
        "name-not-found",
        r"name or service not known|temporary failure in name resolution|nodename nor servname|gaierror|getaddrinfo"
        r"|no address associated with|(could|can) ?not (be )?resolve\w* (the )?(host|address)|unknown host\b|EAI_AGAIN",
        "{who} could not find the address of a host name.",
        "Check the name and the name service of the worker's host.",
    ),
    # --- downloads ---
    _rule(
        "download-refused",
        r"gated repo|GatedRepoError|RepositoryNotFoundError|\b40[13]\b.{0,60}(client error|unauthorized|forbidden)"
        r"|(client error|unauthorized|forbidden|access denied).{0,60}\b40[13]\b|InvalidAccessKeyId"
        r"|SignatureDoesNotMatch|NoCredentialsError|AccessDenied|ExpiredToken"
        r"|invalid username or password|token is required|no token (was )?found|must be (authenticated|logged in)",
        "{who} was refused what it wanted to read from elsewhere.",
        "Give the workers the token or key (in their environment), or accept the terms of the repository.",
    ),
    _rule(
        "download-failed",
        r"offline mode|LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to|max retries exceeded"
        r"|ConnectTimeout|couldn't reach|failed to download|connection refused|\[Errno 111\]"
        r"|\b50[0234]\b.{0,30}server error|HTTP (error|status) 5\d\d\b|^(Read|Connect|Pool)Timeout\b",
        "{who} could not reach a server that it wanted something from.",
        "Check the network of the worker's host, or put the files on storage that it sees and name that path.",
    ),
    # --- what was saved ---
    _rule(
        "file-damaged",
        r"PytorchStreamReader|invalid load key|SafetensorError|header ?too ?large|MetadataIncompleteBuffer"
        r"|failed finding central directory|pickle data was truncated"
        r"|unpickling ?error|not a parquet file|ArrowInvalid"
        r"|incomplete metadata|file is not a zip|bad magic number"
        r"|\w+DecodeError|while decompressing|invalid data stream|contains pickled"
        r"|while parsing a|BadGzipFile|not a gzipped file|zlib\.error"
        r"|LZMAError|UnidentifiedImageError|cannot identify image"
        r"|ran out of input|unexpected end of (file|data)|ended before"
        r"|error tokenizing data|EmptyDataError"
        r"|file signature not found|not an? \w+ file|file is truncated"
        r"|(file|data|archive|checkpoint|image|shard).{0,30}corrupt|corrupt(ed)? (file|data|image|archive)"
        r"|(broken|damaged) (data|file|image|archive)|\bformat (is )?not recogni[sz]ed|(invalid|wrong) magic number"
        r"|(consistency|integrity|checksum|hash) (check|verification) fail|NonMatchingChecksum|(checksum|hash"
        r"|crc)\w* mismatch"
        r"|not a database|does not start with|truncated file|no section headers|ParseError"
        r"|did not match any variant of untagged enum|is not a valid json|expected value at line \d+"
        r"|unable to load weights from (?!.*no such file)",
        "{who} read something that is damaged or of another kind: a file, or a text that was to be one of that kind.",
        "See what was read at the line of the traceback; a file: write it again, or go back to an older one.",
    ),
    _rule(
        "weights-mismatch",
        r"error\(s\) in loading state_dict|size mismatch for |missing key\(s\)|unexpected key\(s\)"
        r"|parameter group that doesn't match"
        r"|loaded state dict|missing key in checkpoint|ignore_mismatched_sizes"
        r"|set a tensor of shape .{0,160}has shape|size mismatch between saved"
        r"|target modules .{0,120}not found|while copying the parameter",
        "{who} loaded weights or a state that belong to another architecture.",
        "Make the model with the configuration of the checkpoint, or load with strict=False knowingly.",
    ),
    # --- the model ---
    _rule(
        "device-mismatch",
        r"same device"
        r"|^(?!.*type \(\S*cuda\S* and \w+ type \(\S*cuda).*(type \([^)]*cuda.{0,60}should be the same"
        r"|should be the same.{0,20}cuda)"
        r"|found at least two devices|can't convert \w+(:\d+)? device type tensor|device type for generator"
        r"|on device:? \w+.{0,60}found one of them on|out of meta tensor",
        "{who} mixed tensors of two devices.",
        "Pass model, optimizer and loaders through accelerator.prepare, and make new tensors on accelerator.device.",
    ),
    _rule(
        "cut-beside-whole",
        r"got mixed torch\.Tensor and DTensor",
        "{who} used a tensor that the plan has cut over the ranks together with a whole one.",
        "A copy of the model that was made before prepare(), for an average say, has whole tensors: fill it from "
        "accelerator.get_state_dict(model), for which all ranks must ask. Of a single tensor take full_tensor(). "
        "--plan ddp cuts nothing.",
    ),
    _rule(
        "dtype-mismatch",
        r"expected scalar type|same (scalar |data ?)?d?types?\b|(weight|bias) type .{0,40}should be the same"
        r"|not implemented for '(Half|BFloat16|Long|Int|Bool|Byte|Float|Double|Char|Short|Complex\w+|Float8\w+)'"
        r"|result type \w+ can't be cast|expected .{0,20}(float|long|half|double).{0,30}(but )?(got|found)"
        r"|found dtype .{0,30}expected|tensor of type \w+Tensor|signature matching types"
        r"|following scalar types|expected .{0,40}to be (a boolean|of (scalar )?(d?type))"
        r"|expected dtype|indices must be (long|int)|used as indices must be|infer output dtype"
        r"|uniform .{0,30}dtype|flatten integer dtype|unsupported dtype"
        r"|only .{0,40}floating point .{0,40}(grad|support)|not supported for the input types|cannot cast ufunc"
        r"|can't convert np\.ndarray of type"
        r"|(float|long|half|double|int|bool)\w* tensor.{0,30}(but )?(got|found) .{0,30}dtype"
        r"|dtypes? .{0,60}(not match|not supported)|two bool tensors|of scalar type \w+ but"
        r"|(only supports?|expected an?) (floating|integer|integral|bool|complex)|unscale FP16 gradients"
        r"|\bdtypes match, got",
        "{who} mixed tensors of different types.",
        "Convert the inputs (x.float(), y.long()), or let accelerator.autocast() choose.",
    ),
    _rule(
        "shape-mismatch",
        r"shapes? .{0,60}(cannot be multiplied|not aligned|mismatch)|size of tensor \w+ .{0,20}must match"
        r"|must match the (existing )?size|core dimension|expected size .{0,80}got"
        r"|is invalid for input of size|sizes? of tensors must match|stack expects each"
        r"|input batch_size .{0,30}target batch_size|could not (be )?broadcast|expected input.{0,60}channels"
        r"|Given groups=|expected \d+D.{0,30}(input|tensor)"
        r"|(size|shape) mismatch|(size|shape)s? of .{0,60}(do|does) not match"
        r"|should contain \d+ elements|target tensor expected"
        r"|input of dimension|does ?n[o']t broadcast|not broadcastable"
        r"|expected (input|target|hidden|weight|bias)\S* .{0,20}(size|shape|batch)"
        r"|(must|should) be equal to (input|hidden)_size"
        r"|square matri|dimensions? .{0,80}must match|must have the same (number of dim|size|shape|length)"
        r"|(target|input) size .{0,80}different|cannot reshape"
        r"|dimension out of range|incompatible (shape|dimension|size)"
        r"|inhomogeneous shape|(should|must) be of (equal|the same) (size|length|shape)|more than 1 value per channel"
        r"|kernel size can't be greater|inconsistent (tensor size|number)|length of values .{0,40}does not match"
        r"|(must|should) be (a )?(\d-?d\b|\d-dimensional|matrix|vector|matrices|vectors)"
        r"|\d-?d (tensor|array|vector|matrix)s? expected"
        r"|was expecting .{0,30}dimension"
        r"|(shape|size) .{0,60}(but|instead) .{0,20}(got|is|was) .{0,20}(shape|size|torch\.size|[\[(]\d)"
        r"|number of (sizes|dimensions|dims) .{0,80}(must|should|greater|less|match)"
        r"|no dimension of size|(must|should) be square|expected \d-?D argument|only .{0,20}\dD .{0,40}supported"
        r"|\b(size|shape|dim|dimension|channel|column|row|element|length)s?\b.{0,80}(divisible|not match|multiply up)"
        r"|same number of (column|row|element|channel|sample|dim)|activate truncation and/or padding"
        r"|(target|input) size .{0,80}must be the same",
        "{who} combined tensors whose shapes do not fit.",
        "Print the shapes at the line of the traceback; the first and the last batch may differ from the others.",
    ),
    _rule(
        "not-finite",
        r"returned nan values"
        r"|\b(loss|grad\w*|norm|value|output|input)s?\b.{0,40}\b(nan|inf|non-?finite|not finite)\b(?!-)"
        r"|\b(nan|inf|non-?finite)\b.{0,40}\b(loss|grad\w*|norm|value|output|input)s?\b|FloatingPointError"
        r"|contains? nan|convert float (nan|infinity) to|probability tensor contains either"
        r"|loss scale .{0,40}(minimum|reached)|minimum loss scale",
        "Values of {who} were no longer finite.",
        "Lower the learning rate, clip gradients, and look at the batch before it; autocast may need a GradScaler.",
    ),
    _rule(
        "autograd",
        r"marked as ready twice|variable ready only once",
        "A parameter of {who} came twice into one backward pass of DistributedDataParallel.",
        "Checkpoint activations with use_reentrant=False, and use parameters only within forward().",
    ),
    _rule(
        "autograd",
        r"backward through the graph a second time|modified by an inplace operation|does not require grad"
        r"|element 0 of tensors"
        r"|leaf variable that requires grad|implicitly created only for scalar"
        r"|on tensor that requires grad|appears to not have been used|view of a leaf|inference tensors? cannot"
        r"|graph leaves|only tensors created explicitly by the user",
        "The backward pass of {who} could not use the graph of its forward pass.",
        "Call backward once a forward pass, do not change its tensors in place, and keep losses out of no_grad().",
    ),
    # --- processes and packages ---
    _rule(
        "data-worker-died",
        r"dataloader worker .{0,40}(exited|killed|is killed)|worker process .{0,20}(died|exited)|BrokenProcessPool"
        r"|subprocess\w* (has|have) (abruptly )?died|pin memory thread exited"
        r"|worker process .{0,40}was (unexpectedly|abruptly) terminated",
        "A data loader worker of {who} was ended.",
        "Its host may be short of memory: use fewer num_workers or a smaller prefetch_factor; with 0 errors are shown.",
    ),
    _rule(
        "not-picklable",
        r"can'?t (get|pickle)|cannot pickle|can not pickle"
        r"|PicklingError|picklable|refusing to serialize|between processes through inheritance"
        r"|pickle .{0,30}(object|local|lambda)",
        "{who} could not send an object to another process.",
        "Define its class or function at the top of a module, or make it where it is used.",
    ),
    _rule(
        "build-failed",
        r"error building extension|ninja: build stopped|'ninja', '-v'|\bCUDA_HOME\b.{0,40}not set"
        r"|nvcc\b.{0,40}not found"
        r"|(failed|unable) to find (a |the )?(working )?c(\+\+|/c\+\+)? compiler|\b(gcc|g\+\+)\b.{0,20}not found"
        r"|unable to compile|compilation terminated|no working c\S* compiler|invalid\w*compiler"
        r"|\bcompile ?error\b|\.h(pp)?: no such file|command .{0,40}\b(gcc|g\+\+|cc|clang|nvcc)\b.{0,400}exit status",
        "{who} could not compile an extension: a compiler or toolkit is not on its host, or does not fit.",
        "Install a package that is built already, or a compiler and the CUDA toolkit of the torch that is used.",
    ),
    _rule(
        "package-missing",
        r"no module named|ModuleNotFoundError|ImportError|DistributionNotFound|requires? the .{0,40}(library|package)"
        r"|(shared object|\.so).{0,80}(cannot open|no such file)|undefined symbol"
        r"|operator \w+::\w+ does not exist"
        r"|(need|needs|must|have) (to )?(have|be) .{0,60}\binstalled\b|\bpip3? install [`'\"\w-]"
        r"|does not recognize this (architecture|model)|compiled (against|using) .{0,40}\b(abi|api|numpy)\b"
        r"|binary incompatib|regenerated with protoc|VersionConflict|numpy is not available"
        r"|your (installed )?version of \w+ is (out of date|too old)"
        r"|requires? \w[\w.-]* ?[<>=!~]=? ?\d",
        "{who} did not find a package, or found another version of it.",
        "Install the same packages on every worker; %cluster shows which hosts there are.",
    ),
    _rule(
        "file-missing",
        r"is not a (local folder|valid model identifier)|path to a local folder or the (repo_id|name)"
        r"|can't load .{0,200}make sure you don't have a local directory"
        r"|HFValidationError|DatasetNotFoundError|doesn't exist on the hub",
        "{who} named a model or data set that is neither a folder that it sees nor one on the hub that it may read.",
        "Check the spelling, name a path that all hosts of the cluster see, or give the workers a token (HF_TOKEN).",
    ),
    _rule(
        "file-missing",
        r"FileNotFoundError|NotADirectoryError|no such file or directory|\[Errno 2\]|NoSuchKey|NoSuchBucket"
        r"|(path|file\w*|folder|directory)\b.{0,80}does not exist|unable to open database file"
        r"|no file named|not appear to have a file|(can't|cannot|could not|unable to) find a? ?(valid )?checkpoint"
        r"|no (valid |complete )?checkpoint\w* (was |were )?found|\b(Entry|Revision)NotFoundError"
        r"|\bno .{0,30}files? (was |were )?found|n't contain any data files",
        "{who} did not find a file or folder.",
        "Ranks work on the hosts of the cluster: name a path that all of them see.",
    ),
    _rule(
        "not-permitted",
        r"PermissionError|is not writ(e)?able|permission denied|\[Errno 13\]"
        r"|operation not permitted|\[Errno 1\]|read-only file system",
        "{who} may not read or write a file.",
        "Check the owner and the mode of the path on the worker's host.",
    ),
    _rule(
        "time-limit",
        r"due to time limit|walltime .{0,30}(exceeded|limit)|exceeded .{0,20}walltime|job killed: .{0,20}time"
        r"|(reach|exceed)\w* .{0,30}\b(run|wall)? ?time limit|longer than (the )?specified deadline"
        r"|\bDeadlineExceeded\b",
        "The allocation of the cluster came to its time limit while {who} ran.",
        "Ask for more time, or use --checkpoint-every and --resume.",
        native=True,
    ),
    _rule(
        "host-lost",
        r"due to node fail|\bNODE_FAIL\b|node is (lost|not ready|down)",
        "The host of {who} has failed.",
        "With --max-restarts K and --checkpoint-every a run goes on elsewhere from its last checkpoint.",
        native=True,
    ),
    _rule(
        "preempted",
        r"due to preemption|spot.{0,40}(interrupt|terminat)|preempted",
        "The host of {who} was taken back by its provider.",
        "Use --checkpoint-every with --max-restarts: such a run goes on elsewhere.",
        native=True,
    ),
)


def read_text(text: str, who: str, native: bool = False) -> Meaning | None:
    """What a text means by the first rule that knows it.

    Args:
        who: the ranks in words: `rank 1`.
        native: whether it is a log and no exception: only what libraries write when they end a process is looked for.
    """
    rules: Iterable[TextRule] = (rule for rule in TEXT_RULES if rule.native) if native else TEXT_RULES
    return next((meaning for rule in rules if (meaning := rule.read(text, who))), None)
