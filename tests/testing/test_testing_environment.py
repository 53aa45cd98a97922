# SPDX-License-Identifier: Apache-2.0
"""How a process finds out which launcher started it, and joins the others."""

import os
import subprocess
import sys

import pytest

from jax_smfree.testing import World, initialize
from jax_smfree.testing.environment import detect, rank_environment

pytestmark = pytest.mark.cpu_only


def jax_variables(rank):
    return {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:12345",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(rank),
    }


def slurm_variables(rank, job="4711"):
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def open_mpi_variables(rank, job="4711"):
    return {
        "PMIX_NAMESPACE": f"prterun-host-{job}@1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


@pytest.mark.parametrize("variables", [jax_variables, slurm_variables, open_mpi_variables])
def test_detect(variables):
    rank = detect(variables(1))
    assert rank is not None
    assert (rank.process_id, rank.num_processes) == (1, 2)


def test_nobody_started_us():
    assert detect({}) is None
    assert detect({"JAX_COORDINATOR_ADDRESS": "host:1"}) is None
    assert detect({**slurm_variables(0), "SLURM_NTASKS": "1"}) is None
    assert detect({**open_mpi_variables(0), "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_the_nearest_launcher_counts():
    slurm, mpi, ours = slurm_variables(0), open_mpi_variables(1), jax_variables(0)
    assert detect({**slurm, **mpi}).launcher == "Open MPI"
    assert "JAX_*" in detect({**slurm, **mpi, **ours}).launcher


def test_incomplete_variables():
    variables = jax_variables(0)
    del variables["JAX_COORDINATOR_ADDRESS"]
    with pytest.raises(RuntimeError, match=r"without JAX_COORDINATOR_ADDRESS.*Set the missing"):
        detect(variables)
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        with pytest.raises(RuntimeError, match=f"{name}='two', expected a number"):
            detect(jax_variables(0) | {name: "two"})


def test_a_single_process_is_left_alone(monkeypatch):
    for name in jax_variables(0):
        monkeypatch.delenv(name, raising=False)
    assert initialize() is False
    world = World()
    world.barrier()
    assert world.exchange({"a": [1]}) == [{"a": [1]}]
    with pytest.raises(TypeError, match="expected what JSON can carry"):
        world.exchange(object())


@pytest.mark.parametrize("variables", [slurm_variables, open_mpi_variables])
def test_processes_of_other_launchers_join(variables):
    code = (
        "from jax_smfree import testing; import jax; "
        "assert testing.initialize() and testing.initialize(); "
        "world = testing.World(jax.process_index(), jax.process_count()); "
        "print(world.exchange(world.rank * 10))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    job = str(os.getpid())  # chooses the port
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, **variables(rank, job)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("[0, 10]" in output for output in outputs), outputs


def test_gpus_are_divided():
    def environment(rank, platform="cuda"):
        return rank_environment(
            rank,
            processes=2,
            devices_per_process=2,
            platform=platform,
            address="127.0.0.1:1",
            base={"CUDA_VISIBLE_DEVICES": "4,5,6,7", "JAX_NUM_CPU_DEVICES": "8"},
        )

    for process, mine in enumerate(("0,1", "2,3")):
        assert environment(process)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
        assert environment(process)["JAX_LOCAL_DEVICE_IDS"] == mine
    assert environment(1)["JAX_PLATFORMS"] == "cuda,cpu"
    assert "JAX_NUM_CPU_DEVICES" not in environment(0, "cpu")
    with pytest.raises(ValueError, match=r"got 4 visible GPUs, expected 6"):
        rank_environment(
            2,
            processes=3,
            devices_per_process=2,
            platform="cuda",
            address="127.0.0.1:1",
            base={"CUDA_VISIBLE_DEVICES": "4,5,6,7"},
        )


def test_looking_for_a_launcher_does_not_import_jax():
    code = "import sys; from jax_smfree import testing; testing.initialize(); "
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
