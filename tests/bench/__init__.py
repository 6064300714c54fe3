"""The product beside its peers, in one run: `python -m tests.bench [axis...]`.

Every axis starts the real thing (an IPython shell, or a kernel, with the extension loaded) and the peers a user would
take instead, takes turns between them, and compares medians. Read the ratios: the seconds belong to the machine. A
peer that could not be installed keeps its rows, which say why.

__main__     which axes, the table, the JSON
measured     one row of the table
shell        an IPython shell in a fresh process, and the process itself
launch       starting the peers that are launchers, finding the ranks, their memory
notebooks    the peers that live in a notebook: what their users type
peers        an environment for those that must not stand in the product's own
dispatch     a warm cell that does nothing, against ipyparallel, nbdistributed and Dask's client.run
start        start of a world to its first collective, and its memory, against launchers and notebooks
logs         what logging costs the loop and what a kill loses, against writers of the peers (the axis `logging`)
writers      those writers
screen       how long a logged value takes to the notebook
throughput   tokens per second of the quickstart's model, against launchers and ipyparallel
panels       what watching a very busy run costs the server, and how far a page is behind
local_cells  what a notebook that shows that run feels of it (the axis `cells`)
pages        what a page takes to draw that run, and one of a million points
supervision  what watching over that training costs it
bodies/      what the ranks run, the same file for everybody
"""
