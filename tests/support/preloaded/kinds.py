"""The programs that tests start again and again, and what each of them imports before it does anything."""

ZYGOTE = "jupyter_llmcloud.training.zygote"

# Nothing that the program would not have imported anyway: what one finds in sys.modules is no other than a user's.
IMPORTS = {
    ZYGOTE: (),  # by functions of its own
    "jupyter_llmcloud.server.headless": (
        *("jupyter_llmcloud.cluster.agent_launcher", "jupyter_llmcloud.server.headless.app"),
        "jupyter_llmcloud.server.headless.__main__",
    ),
    "jupyterlab": ("jupyterlab.labapp", "jupyter_llmcloud.server.extension"),
    "ipykernel_launcher": ("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell"),
    "jupyter_llmcloud.inference": (  # which is forked from a zygote too, where its agent has one
        *("torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
        *("transformers.models.auto.tokenization_auto", "jupyter_llmcloud.inference.__main__"),
        "jupyter_llmcloud.inference.engines.loading",
    ),
    "jupyter_llmcloud.inference.openai.chat.template_process": ("transformers.utils.chat_template_utils", "jinja2"),
    "jupyter_llmcloud.training.preflight.rehearse": ("jupyter_llmcloud.training.preflight.rehearse",),
    "jupyter_llmcloud.server.cli": ("jupyter_llmcloud.server.cli", "httpx"),
    "tests.support.portrait": (
        "json",
        "random",
        "resource",
        "signal",
    ),  # what a test compares with one that is not forked
}


def kind_of(command):
    """Which of them a command line starts, and where in it that is said; "" for none of them."""
    for place, word in enumerate(command[1:-1], 1):
        if word == "-m":
            return (command[place + 1] if command[place + 1] in IMPORTS else ""), place
        if not word.startswith("-") and command[place - 1] not in ("-X", "-W"):
            break
    return "", 0
