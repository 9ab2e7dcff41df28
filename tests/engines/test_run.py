"""Calls on engines: in this process, in others, on Ray; what fails, what dies, and what is left."""

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import ray
from engines import calls

from keras_probes import RayEngine
from keras_probes.engines.run import TRIES, check_engine, run

ENGINES = {
    "here": lambda: None,
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": lambda: ProcessPoolExecutor(2),
    "ray": lambda: RayEngine(2),
}
# Workers of Ray take long to start: CI sees them die and be replaced, and run other tests.
ON_RAY = pytest.param("ray", marks=pytest.mark.weekly)
ALL = ["here", "threads", "processes", ON_RAY]
ELSEWHERE = ["threads", "processes", ON_RAY]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster that is there before the engine, whose workers import what tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        yield
        ray.shutdown()


def outcomes(engine, function, *more, n=6):
    found = list(run(engine, function, ((number, *more) for number in range(n))))
    return {outcome.args[0]: outcome for outcome in found}, found


@pytest.mark.parametrize("engine", ALL)
def test_calls_return(engine):
    found, all_of_them = outcomes(ENGINES[engine](), calls.double, n=20)
    assert len(all_of_them) == len(found) == 20
    assert {number: of.result[1] for number, of in found.items()} == {i: 2 * i for i in range(20)}
    here = {of.result[0] for of in found.values()} == {os.getpid()}
    assert here == (engine in ("here", "threads"))


@pytest.mark.parametrize("engine", ALL)
def test_what_fails_is_tried_again(engine, tmp_path):
    found, _ = outcomes(ENGINES[engine](), calls.fail, str(tmp_path))
    assert [number for number, of in found.items() if of.error is not None] == [3]
    assert type(found[3].error) is ValueError
    assert str(found[3].error) == "number 3"
    tries = 1 if engine == "here" else TRIES
    assert len(list(tmp_path.glob("3-*"))) == tries
    assert len(list(tmp_path.iterdir())) == 5 + tries


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_a_worker_that_is_killed_is_replaced(engine, tmp_path):
    found, _ = outcomes(ENGINES[engine](), calls.die_once, str(tmp_path))
    assert {number: of.result for number, of in found.items()} == {i: i for i in range(6)}


@pytest.mark.parametrize("engine", ["processes", ON_RAY])
def test_a_call_that_kills_each_worker_loses_no_other(engine):
    found, _ = outcomes(ENGINES[engine](), calls.die, n=40)
    assert [number for number, of in found.items() if of.error is not None] == [3]


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_few_calls_are_taken_at_a_time(engine):
    taken = []

    def numbers():
        for number in range(12):
            taken.append(number)
            yield (number,)

    ahead = []
    for done, _ in enumerate(run(ENGINES[engine](), calls.slow, numbers()), 1):
        ahead.append(len(taken) - done)
    assert max(ahead) <= 4


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_who_stops_listening_leaves_nothing_running(engine, tmp_path):
    found = run(ENGINES[engine](), calls.mark, ((i, str(tmp_path)) for i in range(100)))
    next(found)
    found.close()
    begun, ended = ({f.stem for f in tmp_path.glob(f"*.{end}")} for end in ("begun", "ended"))
    assert begun == ended
    assert len(begun) < 10


def test_an_executor_is_its_owners_to_end():
    with ThreadPoolExecutor(1) as executor:
        list(run(executor, calls.double, [(1,)]))
        assert executor.submit(calls.double, 2).result()[1] == 4


def test_workers_end_with_who_started_them(tmp_path):
    script = f"""
        import os, sys
        sys.path[:0] = {sys.path!r}
        from concurrent.futures import ProcessPoolExecutor
        from engines import calls
        from keras_probes.engines.run import run

        if __name__ == "__main__":
            for outcome in run(ProcessPoolExecutor(2), calls.double, ((i,) for i in range(100))):
                print(outcome.result[0], flush=True)
                os.kill(os.getpid(), 9)
    """
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    ended = subprocess.run([sys.executable, file], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -9
    worker = int(ended.stdout.split()[0])
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} is still there")


@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": 1.5}, {"workers": 2, "gpus": -1}])
def test_numbers_of_workers(given):
    with pytest.raises(ValueError, match=r"Expected RayEngine\(workers=, gpus=\)"):
        RayEngine(**given)


def test_what_is_no_engine():
    with pytest.raises(TypeError, match=r"Expected `engine` to be None.*Received: 8"):
        check_engine(8)


@pytest.mark.weekly
def test_a_cluster_of_ones_own_is_left_running():
    assert len(outcomes(RayEngine(2), calls.double)[0]) == 6
    assert ray.is_initialized()


def test_an_actor_that_ray_kills_is_replaced():
    with RayEngine(2).started() as workers:
        workers.submit(calls.slow, 0).result()
        killed = next(iter(workers._calls))
        ray.kill(killed)
        for number in range(6):  # the calls that came to it are lost; `run` tries them again
            with contextlib.suppress(ray.exceptions.RayActorError):
                assert workers.submit(calls.slow, number).result() == number
        while len(workers._calls) < 2:
            time.sleep(0.1)
        assert killed not in workers._calls


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "keras_probes\[ray\]"'):
        list(run(RayEngine(1), calls.double, [(1,)]))
