# SPDX-License-Identifier: Apache-2.0
"""The option ``--backend``, and what the tests of one backend only are marked with."""

import contextlib
import os
import signal

import pytest

_MARKS = {"cpu_only": "cpu", "cuda_only": "cuda"}


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the ranks are: eight virtual CPU devices, or the GPUs of this host",
    )


def pytest_configure(config):
    """Sets what JAX reads when it is imported, which no conftest.py may do before.

    What a launcher has decided stays. CPU devices exist beside GPUs too, to compare with.
    """
    flags = {"--xla_force_host_platform_device_count": "8"}
    if config.getoption("--backend") == "cuda":
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        # Results are compared with those of other programs: TensorFloat-32 would differ in the
        # third digit, and matmuls that are tuned by their time from one compilation to the next.
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
        flags["--xla_gpu_autotune_level"] = "0"
    else:
        # Compiling takes most of the time; .ci/run also has tests with what users compile with.
        flags["--xla_backend_optimization_level"] = "0"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What this run was told is not for those that tests start.
    os.environ.pop("PYTEST_ADDOPTS", None)
    # A shell that runs tests in the background has its children ignore it, and theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = os.environ.get("XLA_FLAGS", "")
    more = [f"{name}={value}" for name, value in flags.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()
    for mark, backend in _MARKS.items():
        config.addinivalue_line("markers", f"{mark}: the test is about the {backend} backend")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, backend in _MARKS.items():
            if item.get_closest_marker(mark) and config.getoption("--backend") != backend:
                reason = f"about the {backend} backend: --backend {backend}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def groups(request):
    """Makes EP groups and closes them; raises what went wrong in any of them.

    Its parameter, if it has one, is a part of their config, or `support.PORTABLE`.
    """
    import jax_smfree as smfree
    from support import PORTABLE, devices, portable

    made = []
    common = getattr(request, "param", {})
    kind = contextlib.nullcontext
    if common == PORTABLE:
        kind, common = portable, {}
    if "ranks_per_node" in common:
        devices(2 * common["ranks_per_node"])

    def create(mesh, axis="ep", **config):
        config = common | config
        with kind():
            group = smfree.EpGroup.create(mesh, axis, config=smfree.EpConfig(**config))
        made.append(group)
        return group

    yield create
    for group in made:
        try:
            if not group.closed:
                group.check()
        finally:
            group.close()
