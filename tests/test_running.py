"""experiments/running.py: stages in parallel, locks, launchers."""
import json
import subprocess
import sys
import threading
import time

import pytest

from experiments import running
from experiments.stages import Stage
from support.cli import BadInput


def stage_that(folder, name, code, *needs):
    """A stage that runs Python code with the path of its result as OUT."""
    return Stage(("spectral.py", code), folder / name, needs)


def test_stages_run_in_parallel_and_in_order_of_need(tmp_path):
    order, mutex = [], threading.Lock()

    def run_one(stage, environment, lock):
        assert all(running.finished(need) for need in stage.needs)
        time.sleep(0.05)
        with mutex:
            order.append((stage.out.name, environment["slot"]))
        stage.out.write_text("{}")
        running.write_record(stage, 0.0, "", None)

    first = [stage_that(tmp_path, f"a{k}", "") for k in range(4)]
    last = stage_that(tmp_path, "z", "", *first)
    assert running.Worker([last], [{"slot": 0}, {"slot": 1}], run_one).run() == []
    assert order[-1][0] == "z" and {name for name, _ in order} == {"a0", "a1", "a2", "a3",
                                                                   "z"} and len({s for _, s in order}) == 2


def test_a_training_with_a_launcher_has_all_gpus_and_the_rest_one_each(tmp_path):
    log, mutex = [], threading.Lock()

    def run_one(stage, environment, lock):
        with mutex:
            log.append((stage.argv[0], environment.get("CUDA_VISIBLE_DEVICES")))
        time.sleep(0.2)
        stage.out.write_text("{}")
        running.write_record(stage, 0.0, "", None)

    trained = [Stage(("train.py", str(k)), tmp_path / f"run{k}") for k in range(2)]
    probes = [stage_that(tmp_path, f"p{k}", "", one) for k, one in enumerate(trained)]
    assert running.run_all([*trained, *probes], "torchrun", 2, 2, run_one) == []
    assert log[:2] == [("train.py", None)] * 2 and {gpu for _, gpu in log[2:]} == {"0", "1"}


def test_two_instances_share_the_work_and_do_none_twice(tmp_path):
    todo, log = [stage_that(tmp_path, f"s{k}", "") for k in range(8)], []

    def run_one(stage, environment, lock):
        log.append(stage.out.name)
        time.sleep(0.05)
        stage.out.write_text("{}")
        running.write_record(stage, 0.0, "", None)

    instances = [threading.Thread(target=running.Worker(todo, [{}], run_one).slot, args=({}, 0.02))
                 for _ in range(2)]
    for one in instances:
        one.start()
    for one in instances:
        one.join(20)
    assert sorted(log) == [f"s{k}" for k in range(8)]


def test_a_lock_goes_with_its_holder(tmp_path):
    stage = stage_that(tmp_path, "x", "")
    code = ("import sys, time; from pathlib import Path; from experiments.running import claimed; from "
            "experiments.stages import Stage\n" f"with claimed(Stage(('x',), Path({str(stage.out)!r}))) as "
            "lock:\n print(lock is not None, flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          cwd=running.HERE) as holder:
        assert holder.stdout.readline() == "True\n"
        with running.claimed(stage) as lock:
            assert lock is None
        holder.kill()
    with running.claimed(stage) as lock:
        assert lock is not None


def test_a_failing_stage_stops_the_others_and_is_told(tmp_path):
    def fail(stage, environment, lock):
        raise BadInput("no luck")

    worker = running.Worker([stage_that(tmp_path, f"s{k}", "") for k in range(4)], [{}, {}], fail)
    with pytest.raises(BadInput, match="no luck"):
        worker.run()
    broken = Stage(("spectral.py", "nothing"), tmp_path / "x.json")
    with pytest.raises(BadInput, match="exit status 2"):
        running.run(broken)


def test_a_stage_is_a_process_whose_result_is_recorded(tmp_path):
    out = tmp_path / "found.json"
    stage = Stage(("spectral.py", "theorem4.2", "--s", "3", "--rho", "0.4", "--json", str(out)), out)
    running.run(stage)
    assert json.loads(out.read_text())["hidden"] == 1 and running.finished(stage)
    record = json.loads(stage.record().read_text())
    assert "spectral.py theorem4.2 --s 3" in record["command"] and record["seconds"] > 0
    assert record["hardware"] == running.hardware() and (tmp_path / "found.json.log").exists()


def test_launchers_and_slots(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert running.program("train.py", ("torchrun", "--nproc_per_node=8"))[:2] == ("torchrun",
                                                                                   "--nproc_per_node=8")
    assert running.program("evaluate.py", ("torchrun",))[0] == sys.executable
    assert running.program("experiments.losses")[1:] == ("-m", "experiments.losses")
    assert running.slots_for(1, 0) == [{}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in running.slots_for(3, 3)] == ["0", "1", "2"]
    assert len(running.slots_for(2, 0)) == 2
    assert running.slots_for(1, 8) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in running.slots_for(2, 2)] == ["4", "6"]
