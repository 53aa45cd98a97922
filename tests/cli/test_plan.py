# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import pathlib

import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree import plan
from jax_smfree.plan import traffic
from jax_smfree.plan.machine import PHASES

pytestmark = pytest.mark.cpu_only

PATH = pathlib.Path(__file__).parents[2] / "benchmarks/results/gpu-nvidia-h200-x2.json"
MEASURED = json.loads(PATH.read_text())
NODES, PROCESSES = (
    json.loads(PATH.with_name(f"gpu-{name}-nvidia-h200-x2.json").read_text())
    for name in ("nodes", "processes")
)
# What docs/command_line.md states: of all four phases, and of one phase of 50 µs and more.
MAX_ERROR_OF_ALL, MAX_ERROR_OF_ONE = 0.10, 0.15


def config_of(shape, **options):
    sizes = {
        "num_experts": shape["experts"],
        "top_k": shape["top_k"],
        "hidden": shape["hidden"],
        "max_tokens": shape["rows"],
    }
    return smfree.EpConfig(**sizes, **options)


@pytest.mark.parametrize("name", MEASURED["shapes"])
def test_the_model_against_measurements_that_it_has_not_seen(name):
    """The costs of the phases are made of the other shapes."""
    shape = MEASURED["shapes"][name]
    others = {k: v for k, v in MEASURED["shapes"].items() if k != name}
    machine = plan.Machine.from_results(MEASURED | {"shapes": others}, network_gb_s=50.0)
    found = plan.predict(config_of(shape), MEASURED["ranks"], machine)
    phases = shape["movers"]["default"]["phases"]
    assert found.sm_us == pytest.approx(phases["total"]["p50"], rel=MAX_ERROR_OF_ALL)
    for phase in PHASES:
        if phases[phase]["p50"] >= 50:
            assert found.phase_us[phase] == pytest.approx(
                phases[phase]["p50"], rel=MAX_ERROR_OF_ONE
            )
    assert found.nvlink_bytes == pytest.approx(shape["wire_bytes"], rel=0.02)


def shapes_of(rounds):
    return [shape for found in rounds for shape in found["shapes"].values()]


def test_the_model_against_a_process_per_gpu():
    """The defaults are from another run, of one process."""
    for shape in shapes_of(PROCESSES["a process per GPU"]):
        phases = shape["movers"]["default"]["phases"]
        found = plan.predict(config_of(shape), 2)
        assert found.sm_us == pytest.approx(phases["total"]["p50"], rel=0.05)


@pytest.mark.parametrize("mode", ["direct", "hierarchical"])
def test_the_model_against_two_nodes_of_two(mode):
    """Bytes that the library counted; and phases, where none of them waits for another rank."""
    for shape in shapes_of(NODES[mode]):
        found = plan.predict(config_of(shape, ranks_per_node=2, mode=mode), 4)
        counted = shape["measured"]["bytes"]["counted"]
        for operation in ("dispatch", "combine"):
            total = counted[f"{operation}_internode_bytes"]
            assert 4 * found.network_bytes == pytest.approx(total, rel=0.01)
        for phase in PHASES if mode == "direct" else PHASES[:1]:
            measured = shape["measured"]["phases"][phase]["p50"]
            assert found.phase_us[phase] == pytest.approx(measured, rel=MAX_ERROR_OF_ONE)


def test_the_defaults_are_what_the_results_say():
    assert plan.Machine.from_results(MEASURED) == plan.Machine()


def test_results_without_links_need_them_given():
    results = MEASURED | {"link_ceilings": {"error": "no nvcc"}}
    with pytest.raises(ValueError, match="without 'nvlink_gb_s'"):
        plan.Machine.from_results(results)
    assert plan.Machine.from_results(results, nvlink_gb_s=400.0).nvlink_gb_s == 400.0


def test_buffers_are_what_the_size_hints_say():
    config = smfree.EpConfig(num_experts=64, top_k=2, hidden=128, max_tokens=64, ranks_per_node=8)
    predictions = plan.sweep(config, [32])
    assert [prediction.mode for prediction in predictions] == ["direct", "hierarchical"]
    for prediction in predictions:
        in_mode = dataclasses.replace(config, mode=prediction.mode)
        hints = smfree.nvl_size_hint(in_mode, 32), smfree.rdma_size_hint(in_mode, 32)
        assert prediction.buffer_bytes == sum(hints)


def simulate(rng, rows, ranks, per_node, experts, top_k):
    """Counts of one random routing: (network, NVLink) rows out of a rank, direct and by nodes."""
    ids = np.argsort(rng.random((ranks, rows, experts)), axis=2)[:, :, :top_k]
    to_rank = (ids[..., None] // (experts // ranks) == np.arange(ranks)).any(2)  # [R, T, R]
    to_node = to_rank.reshape(ranks, rows, -1, per_node).any(3)  # [R, T, nodes]
    node = np.arange(ranks) // per_node
    same = node[:, None] == node
    sent = to_rank.sum(1)
    direct = (
        (sent * ~same).sum(1).mean(),
        (sent * (same & ~np.eye(ranks, dtype=bool))).sum(1).mean(),
    )
    to_other_nodes = (to_node.sum(1) * (node[:, None] != np.arange(node.max() + 1))).sum(1).mean()
    index = np.arange(ranks) % per_node
    forwarded = (sent * (index[:, None] != index)).sum() / ranks
    return direct, (to_other_nodes, forwarded)


def test_traffic_is_that_of_a_simulation():
    sizes = {"rows": 400, "ranks": 8, "experts": 16, "top_k": 4}
    direct, hierarchical = simulate(np.random.default_rng(0), per_node=4, **sizes)
    routing = plan.Routing(sizes["experts"], sizes["top_k"])
    for counted, model in ((direct, traffic.direct), (hierarchical, traffic.hierarchical)):
        found = model(routing, sizes["rows"], sizes["ranks"], 4)
        assert (found.network, found.nvlink) == pytest.approx(counted, rel=0.02)


def test_a_sample_shows_the_imbalance():
    rng = np.random.default_rng(0)
    uniform = plan.Routing(16, 2, np.argsort(rng.random((20000, 16)), axis=1)[:, :2])
    even = plan.Routing(16, 2)
    np.testing.assert_allclose(uniform.row_shares(8), even.row_shares(8), rtol=0.05)
    np.testing.assert_allclose(uniform.copy_shares(8), even.copy_shares(8), rtol=0.05)
    config = smfree.EpConfig(num_experts=16, top_k=2, hidden=7168, max_tokens=8192)
    hot = plan.Routing(16, 2, np.tile([[0, 1], [0, 5]], (50, 1)))  # everything visits expert 0
    busy, calm = (plan.predict(config, 4, routing=routing) for routing in (hot, even))
    assert busy.phase_us["dispatch_recv"] > 2 * calm.phase_us["dispatch_recv"]
    assert busy.wire_us > calm.wire_us


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.zeros((4, 3), int), r"int64 \[4, 3\], expected integers \[rows, 2\]"),
        (np.zeros((4, 2)), "float64"),
        (np.full((4, 2), 16), "to 16, expected some, from -1"),
        (np.zeros((0, 2), int), "of 0 ids, expected some"),
    ],
)
def test_bad_samples(sample, message):
    with pytest.raises(ValueError, match=message):
        plan.Routing(16, 2, sample)


def test_table_and_picture(run, tmp_path):
    plot = tmp_path / "plan.png"
    text = run("plan", "--shape", "4096x7168:8of2048", "--plot", plot).output
    assert "2048" in text and "hierarchical" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_numbers_of_the_table(run, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
    )
    sizes = ("--shape", "8192x7168:8of256", "--ranks", "8,16,64")
    text = run("plan", *sizes, "--plot", tmp_path / "plan.png").stdout
    drawn = {
        (line.get_label(), int(ranks)): value
        for axes in figures[0].axes
        for line in axes.get_lines()
        for ranks, value in line.get_xydata()
    }
    rows = [
        line.split()
        for line in text.splitlines()
        if line.split()[1:2] in (["direct"], ["hierarchical"])
    ]
    assert len(rows) == 5
    for ranks, mode, buffers, _, _, phases, wire, *rest in rows:
        shown = {"on the wire, can be hidden": wire, "on the SMs, stays": phases}
        if mode == "hierarchical":
            shown["inside the node, a phase waits"] = rest[0]
        for meaning, value in shown.items():
            assert f"{drawn.pop((f'{mode}: {meaning}', int(ranks))):.2f}" == value
        assert f"{drawn.pop((mode, int(ranks))):.1f}" == buffers
    assert drawn == {}


def test_json_with_given_and_measured_rates(run, tmp_path):
    sample = tmp_path / "ids.npy"
    np.save(sample, np.random.default_rng(0).integers(0, 64, (1000, 2)))
    options = ("--shape", "1024x512:2of64", "--machine", PATH, "--network-gb-s", 25)
    value = json.loads(
        run("plan", *options, "--ranks", "2,16", "--routing", sample, "--json").output
    )
    assert value["machine"]["network_gb_s"] == 25
    assert value["machine"]["nvlink_gb_s"] == MEASURED["link_ceilings"]["large"]["all_to_all"]
    modes = [(p["ranks"], p["mode"]) for p in value["predictions"]]
    assert modes == [(2, "direct"), (16, "direct"), (16, "hierarchical")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "many"), "expected ROWSxHIDDEN:KofEXPERTS"),
        (("--ranks", "2,x"), "expected numbers, as 2,4,8"),
        (("--ranks", "3"), "num_experts a multiple of num_ranks"),
        (("--ranks", "12", "--shape", "8x8:1of12"), "expected a divisor of 12"),
        (("--hbm-gb-s", "-1"), "got '-1', expected a positive number"),
        (
            ("--machine", PATH.with_name("cpu-amd-epyc-2.json")),
            "complete run of `python -m benchmarks",
        ),
    ],
)
def test_errors_say_the_cure(run, options, message):
    output = run("plan", *options, exit_code=2).output
    assert message in " ".join(output.replace("│", " ").split())


def test_hierarchical_needs_nodes():
    sizes = {"num_experts": 16, "top_k": 2, "hidden": 8, "max_tokens": 8}
    with pytest.raises(ValueError, match=r"Set EpConfig\.ranks_per_node"):
        plan.predict(smfree.EpConfig(**sizes, mode="hierarchical"), 8)
    for mode in (None, "hierarchical"):  # what the library would choose
        config = smfree.EpConfig(**sizes, ranks_per_node=4, mode=mode)
        assert plan.predict(config, 8).mode == "hierarchical"


def test_a_recv_capacity_bounds_the_buffers(run):
    def buffers(*options):
        text = run("plan", "--ranks", "16,64", "--ranks-per-node", "1", *options, "--json").output
        return [found["buffer_bytes"] for found in json.loads(text)["predictions"]]

    few, many = buffers("--recv-capacity", "81920")
    assert many < 1.05 * few
    few, many = buffers()
    assert many > 3.5 * few


def test_fp8_halves_what_a_dispatch_moves(run):
    def prediction(*options):
        text = run("plan", "--ranks", "2", *options, "--json").output
        (found,) = json.loads(text)["predictions"]
        return found

    rows, fp8 = prediction(), prediction("--fp8")
    # One byte and a 32nd for each element, instead of two.
    assert fp8["nvlink_bytes"] / rows["nvlink_bytes"] == pytest.approx((1 + 4 / 128) / 2)
    assert fp8["phase_us"]["dispatch_recv"] < rows["phase_us"]["dispatch_recv"]
    assert fp8["phase_us"]["combine_send"] == rows["phase_us"]["combine_send"]
