# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import types

import jax
import pytest

from jax_smfree import doctor
from jax_smfree.doctor import devices, environment, links, network, software

pytestmark = pytest.mark.cpu_only


def names(findings, status=None):
    return [f.name for f in findings if status in (None, f.status)]


class NvmlError(Exception):
    """What NVML raises for what a GPU does not have."""


def fake_nvml(free=130, peers=True, count=2):
    """The part of NVML that is used, of GPUs with 140 GiB."""
    return types.SimpleNamespace(
        NVMLError=NvmlError,
        NVML_P2P_STATUS_OK=0,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda i: f"gpu{i}",
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(free=free << 30, total=140 << 30),
        nvmlDeviceGetName=lambda _: "NVIDIA H200",
        nvmlDeviceGetP2PStatus=lambda a, b, caps: 0 if peers or caps != 0 else 6,
        nvmlSystemGetDriverVersion=lambda: "580.159",
    )


def test_tables(run):
    text = run("doctor").output
    for topic in ("software", "build", "devices", "GPUs", "network"):
        assert topic in text
    assert jax.__version__ in text


def test_json(run):
    diagnosis = json.loads(run("doctor", "--json").output)
    assert diagnosis["ok"]
    found = {(f["topic"], f["name"]): f["value"] for f in diagnosis["findings"]}
    assert found["devices", "jax"] == f"{jax.device_count()} × cpu"
    assert found["build", "cpu"] == f"{len(software.targets.TARGETS)} custom calls, registered"


def test_a_problem_is_exit_code_1_with_its_cure(run, monkeypatch):
    def broken(environ, gpus):
        yield doctor.Finding("devices", "jax", "no GPU", "problem", "pip install 'jax[cuda13]'")

    monkeypatch.setattr(devices, "jax_devices", broken)
    result = run("doctor", exit_code=1)
    assert "problem jax: no GPU" in result.output
    assert "pip install 'jax[cuda13]'" in result.output


def test_every_finding_that_is_not_ok_has_a_cure():
    for finding in doctor.examine().findings:
        assert finding.cure or finding.status == "ok"


def test_jax_and_its_parts_must_be_of_one_version():
    good = {"jax": "0.12.0.1", "jaxlib": "0.12.0", "jax-cuda13-plugin": "0.12.0"}
    good |= {"numpy": "2.4", "lazy-loader": "0.5"}
    assert not names(software.versions(good), "problem")
    (problem,) = (
        f for f in software.versions(good | {"jax-cuda13-plugin": "0.11.2"}) if f.status != "ok"
    )
    assert problem.name == "jax-cuda13-plugin"
    assert "pip install 'jax-cuda13-plugin==0.12.0'" in problem.cure


@pytest.mark.parametrize("jax", ["0.10.1", "0.9.0.1", "0.6.2", "0.10.2rc1"])
def test_versions_outside_of_what_the_package_requires(jax):
    packages = software.installed() | {"jax": jax, "jaxlib": jax}
    found = {f.name: f for f in software.versions(packages) if f.status == "problem"}
    assert {"jax", "jaxlib"} <= found.keys()
    assert found["jax"].cure == "jax_smfree needs jax>=0.10.2. pip install 'jax>=0.10.2'"


def test_an_older_python(monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.10.13")
    (problem,) = (f for f in software.versions(software.installed()) if f.status == "problem")
    assert (problem.name, problem.value) == ("python", "3.10.13")
    assert problem.cure.startswith("jax_smfree needs python>=3.11.")


def test_a_package_that_is_missing():
    packages = {n: v for n, v in software.installed().items() if n != "lazy-loader"}
    assert names(software.versions(packages), "problem") == ["lazy-loader"]


def test_the_first_on_the_path_counts(monkeypatch, tmp_path):
    for version, folder in (("9.9", tmp_path / "first"), ("1.1", tmp_path / "second")):
        info = folder / f"some_thing-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: Some.thing\nVersion: {version}\n"
        )
        monkeypatch.syspath_prepend(str(folder))
    assert software.installed()["some-thing"] == "1.1"


def test_the_grouped_matmul_needs_jax_0_11_on_gpus():
    old = {"jax": "0.10.2", "jaxlib": "0.10.2"}
    assert names(software.kernels(old, gpus=1), "warning") == ["grouped matmul"]
    assert not names(software.kernels({"jax": "0.11.0"}, gpus=1), "warning")
    assert not names(software.kernels(old, gpus=0), "warning")


def test_gpus_need_a_build_for_them(monkeypatch):
    monkeypatch.setattr(software._native, "has_cuda", False)
    assert names(software.build(gpus=2), "problem") == ["cuda"]
    assert not names(software.build(gpus=0), "problem")


def test_gpus():
    gpus = devices.Gpus(fake_nvml())
    assert [f.value for f in gpus.findings()][1] == "NVIDIA H200, 130.0 of 140.0 GiB free"
    assert gpus.peer_access() == ((True, True), (True, True))
    assert not names(devices.peer_findings(gpus.peer_access()), "problem")
    assert names(devices.Gpus(fake_nvml(free=5)).findings(), "warning") == ["GPU 0", "GPU 1"]


def test_the_matrix_of_peers_is_shown(run, monkeypatch):
    monkeypatch.setattr(devices, "nvml", lambda: contextlib.nullcontext(fake_nvml(peers=False)))
    text = run("doctor", exit_code=1).output
    assert "none between 0–1, 1–0" in text
    assert text.count("✓") == text.count("✗") == 2


def test_gpus_without_memory_and_peers_of_their_own():
    def refuse(*_):
        raise NvmlError("Not Supported")

    library = fake_nvml()
    library.nvmlDeviceGetMemoryInfo = library.nvmlDeviceGetP2PStatus = refuse
    gpus = devices.Gpus(library)
    assert [f.value for f in gpus.findings()][1] == "NVIDIA H200, memory: Not Supported"
    assert gpus.peer_access() == ((True, False), (False, True))


def test_a_build_that_does_not_register(monkeypatch):
    def refuse(platform):
        raise RuntimeError("FFI API 0.4")

    monkeypatch.setattr(software.targets, "register", refuse)
    problem = next(iter(software.build(gpus=0)))
    assert problem.status == "problem" and problem.value.endswith("custom calls, refused")
    assert "FFI API 0.4" in problem.cure


def test_gpus_that_do_not_reach_each_other():
    access = devices.Gpus(fake_nvml(peers=False)).peer_access()
    assert access == ((True, False), (False, True))
    (problem,) = devices.peer_findings(access)
    assert (problem.status, problem.value) == ("problem", "none between 0–1, 1–0")


@pytest.mark.parametrize(
    ("environ", "status", "name"),
    [
        ({}, "warning", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, "warning", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "most"}, "warning", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, "warning", "XLA_CLIENT_MEM_FRACTION"),
        (
            {"XLA_CLIENT_MEM_FRACTION": "0.5", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
            "problem",
            "XLA_CLIENT_MEM_FRACTION",
        ),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "problem", "CUDA_LAUNCH_BLOCKING"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "warning", "CUDA_DEVICE_MAX_CONNECTIONS"),
    ],
)
def test_settings_that_break_the_overlap(environ, status, name):
    assert name in names(environment.gpu_settings(environ, gpus=1), status)
    assert not names(environment.gpu_settings(environ, gpus=0))


def test_good_settings():
    environ = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    assert not names(environment.gpu_settings(environ, gpus=0), "warning")
    assert names(environment.gpu_settings(environ, gpus=1), "ok")


def test_huge_pages(tmp_path):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]")
    assert names(environment.cpu_settings(setting)) == ["transparent huge pages"]
    setting.write_text("always [madvise] never")
    assert not names(environment.cpu_settings(setting))


def test_adapters(tmp_path):
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand")
    up, down = network.adapters(tmp_path)
    assert (up.name, up.value) == ("mlx5_0 port 1", "InfiniBand, 400 Gb/sec (4X NDR)")
    assert (down.status, down.value) == ("warning", "InfiniBand, 1: DOWN")


def test_nvshmem_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(network.importlib.metadata, "files", lambda _: [])
    (finding,) = network.nvshmem({"nvidia-nvshmem-cu13": "3.4.5"})
    assert finding.status == "warning"
    assert "no libnvshmem_host.so* in the wheel" in finding.value


def test_the_network_of_one_process(run):
    text = run("doctor", "--network", exit_code=1).output
    assert "srun jax-smfree doctor --network" in text


def outcome(**changes):
    return {"seconds": [1e-4, 1e-2], "wrong": 0, "error": "", "tried": True} | changes


@pytest.mark.parametrize(
    ("of_the_other", "status", "value"),
    [
        ({}, "ok", "right; a row there and back in 100 µs, 1 MB each way at 0.21 GB/s"),
        ({"seconds": [2e-4, 1e-2]}, "ok", "right; a row there and back in 200 µs"),
        ({"wrong": 3}, "problem", "3 rows arrived wrong"),
        ({"error": "rank 1 waited", "seconds": []}, "problem", "rank 1 waited"),
        ({"tried": False, "seconds": []}, "warning", "not tried"),
    ],
)
def test_what_processes_say_of_a_pair(of_the_other, status, value):
    seen = [outcome(), outcome(**of_the_other)]
    finding = links._finding("a ↔ b", 256, seen)
    assert finding.status == status and finding.value.startswith(value)


def test_settings_of_nvshmem():
    environ = {"NVSHMEM_REMOTE_TRANSPORT": "ucx", "UCX_TLS": "tcp", "HOME": "/"}
    assert {f.name: f.value for f in network.settings(environ)} == {
        "NVSHMEM's transport": "ucx",
        "NVSHMEM_REMOTE_TRANSPORT": "ucx",
        "UCX_TLS": "tcp",
    }
