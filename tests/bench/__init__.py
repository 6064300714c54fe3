"""The product beside its peers, in one run: `python -m tests.bench [axis...]`.

Every axis starts the real thing (an IPython shell with the extension loaded) and the peers a user would take instead,
takes turns between them, and compares medians. Read the ratios: the seconds belong to the machine.

__main__     which axes, the table, the JSON
measured     one row of the table
shell        an IPython shell in a fresh process, and the process itself
launch       starting the peers, finding the ranks, their memory
dispatch     a warm cell that does nothing, against ipyparallel's %%px
start        start of a world to its first collective, and its memory, against three launchers
throughput   tokens per second of the quickstart's model, against torchrun
bodies/      what the ranks run, the same file for everybody
"""
