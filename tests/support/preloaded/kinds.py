"""The programs that tests start again and again, and what each of them imports before it does anything."""

ZYGOTE = "jupyter_llmcloud.training.zygote"
HOST = "jupyter_llmcloud.cluster.host"
WORKER = "a worker of Dask"
SPAWNED = "from multiprocessing.spawn import spawn_main"

LLAMA = (
    "torch",
    "transformers",
    *(f"transformers.models.{name}" for name in ("auto.modeling_auto", "llama.modeling_llama")),
)
TOKENIZERS = "transformers.models.auto.tokenization_auto"

# Nothing that the program would not have imported anyway: what one finds in sys.modules is no other than a user's.
IMPORTS = {
    ZYGOTE: (),  # by functions of its own
    HOST: (HOST, "distributed.deploy.local", "distributed.nanny"),
    WORKER: ("distributed.nanny", "distributed.worker"),
    "jupyter_llmcloud.server.headless": (
        *("jupyter_llmcloud.cluster.agent_launcher", "jupyter_llmcloud.server.headless.app"),
        "jupyter_llmcloud.server.headless.__main__",
    ),
    "tests.support.portrait": (
        "json",
        "random",
        "resource",
        "signal",
    ),  # tells how it differs from one that is not forked
    "jupyterlab": ("jupyterlab.labapp", "jupyter_llmcloud.server.extension"),
    "ipykernel_launcher": ("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell"),
    "jupyter_llmcloud.inference": (
        *(*LLAMA, TOKENIZERS, "jupyter_llmcloud.inference.replica", "jupyter_llmcloud.inference.engines.loading"),
        "jupyter_llmcloud.inference.__main__",
    ),
    "jupyter_llmcloud.inference.openai.chat.template_process": ("transformers.utils.chat_template_utils", "jinja2"),
    "jupyter_llmcloud.compression": (
        *(*LLAMA, TOKENIZERS, "jupyter_llmcloud.compression.making", "jupyter_llmcloud.compression.measure.measuring"),
        "jupyter_llmcloud.protocol.compression",
    ),
}


def kind_of(command, parent):
    """Which of them a command line starts, and where in it what is run begins; "" for none of them.

    `parent` gives the command line of the process that has started it.
    """
    for place, word in enumerate(command[1:-1], 1):
        if word == "-m":
            return (command[place + 1] if command[place + 1] in IMPORTS else ""), place
        if word == "-c":
            is_worker = command[place + 1].startswith(SPAWNED) and HOST in parent()
            return (WORKER if is_worker else ""), place
        if not word.startswith("-") and command[place - 1] not in ("-X", "-W"):
            break
    return "", 0
