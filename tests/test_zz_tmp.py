import os, signal, time, threading
from tests.worlds import *
from tests.test_world_stop import *
def test_it(new_world):
    world = new_world()
    world.ok("import faulthandler, signal; faulthandler.register(signal.SIGUSR1, all_threads=True)\n")
    for place in PLACES.values(): test_stop_ends_the_cell_and_keeps_the_variables(world, place)
    test_stop_in_a_loader_with_workers(world)
    for i in range(6):
        running = world.send(TRAINING).wait_for("in it", times=2).stop()
        pids = world.beside().pids()
        def dump():
            for p in pids: os.kill(p, signal.SIGUSR1)
        t = threading.Timer(1.2, dump); t.start()
        out = running.end(); t.cancel()
        print(i, out.seconds, out.report, world.describe()["generation"])
        if out.seconds > 1: print(out.text(kind="stderr"))
