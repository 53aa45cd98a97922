# SPDX-License-Identifier: Apache-2.0
"""Trains a small mixture-of-experts language model on the sources of the Python standard library.

    python examples/train_moe_lm.py                  # all GPUs of this machine; where there are
                                                     # none 4 virtual CPU devices, two minutes
    python examples/train_moe_lm.py --processes 2    # on CPUs, as 2 processes of 2 devices

Sequences and experts are split over all devices. Rows travel to the ranks of their experts and back
through jax_smfree, forward and backward, while the shared expert computes. At the end the held-out
loss is computed once more with the plain jnp reference in the place of the library; the exit status
is not 0 if the two differ by more than rounding.

    train_moe_lm.py    this file: command line, training loop, report
    moe_training.py    the compiled functions: step, held-out loss, sampling
    moe_lm.py          the model
    stdlib_text.py     the text
    figures.py         the pictures
"""

import argparse
import dataclasses
import pathlib
import sys
import time

import figures
import jax
import moe_lm
import moe_training
import numpy as np
import stdlib_text
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

import jax_smfree as smfree
from jax_smfree import nn, testing

CPU_DEVICES = 4
SEQUENCES_PER_RANK = 4
HELD_OUT_BATCHES = 8
HELD_OUT_TIMES = 5  # how often the held-out loss is computed during training
# Float32 sums in another order differ in the 7th digit; the loss is a mean of 16,384 bytes.
TOLERANCE = 1e-5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument(
        "--devices",
        type=int,
        help=f"ranks, over all processes; None: all GPUs, or {CPU_DEVICES} CPUs",
    )
    parser.add_argument("--processes", type=int, default=1, help="processes to start on this host")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="directory for pictures")
    parser.add_argument(
        "--implementation",
        choices=["smfree", "reference"],
        default="smfree",
        help="what dispatches and combines in training",
    )
    parser.add_argument(
        "--router", choices=list(moe_lm.ROUTERS), default="softmax", help="of all layers"
    )
    parser.add_argument(
        "--wire",
        choices=list(moe_training.WIRES),
        default="float32",
        help="what rows of a dispatch travel as",
    )
    return parser.parse_args()


def launch_processes(args: argparse.Namespace) -> int:
    """Runs this program in ``args.processes`` processes and shows what the first one prints."""
    devices = args.devices or CPU_DEVICES
    if devices % args.processes:
        raise SystemExit(f"{devices} devices do not divide over {args.processes} processes.")
    own_flags = ["--steps", args.steps, "--devices", devices]
    own_flags += ["--out", args.out.absolute(), "--implementation", args.implementation]
    own_flags += ["--router", args.router, "--wire", args.wire]
    result = testing.launch(
        [__file__, *map(str, own_flags)],
        processes=args.processes,
        devices_per_process=devices // args.processes,
        timeout_s=1800,
        follow=sys.stderr,
    )
    result.check()
    return 0


def main() -> int:
    args = parse_arguments()
    if args.processes > 1:
        return launch_processes(args)
    if not testing.initialize():
        jax.config.update("jax_num_cpu_devices", args.devices or CPU_DEVICES)
    # GPUs would round the operands of float32 matmuls to 11 bits (TF32), and so make differences in
    # the 7th digit between library and reference larger.
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = Mesh(np.array(jax.devices()[: args.devices]), (moe_lm.AXIS,))
    config = moe_lm.ModelConfig(router=moe_lm.ROUTERS[args.router])
    ep_config = moe_training.group_config(config, mesh.size, SEQUENCES_PER_RANK, args.wire)
    with smfree.EpGroup.create(mesh, moe_lm.AXIS, config=ep_config) as group:
        run = Run(args, group, config)
        run.train()
        same = run.compare_with_reference()
        run.sample()
        run.report()
    return 0 if same else 1


class Run:
    """One training run; every process executes it, the first one speaks."""

    def __init__(
        self, args: argparse.Namespace, group: smfree.EpGroup, config: moe_lm.ModelConfig
    ) -> None:
        self.args = args
        self.group = group
        self.config = config
        self.training = moe_training.Training(
            group, config, steps=args.steps, implementation=args.implementation
        )
        self.text = stdlib_text.load()
        self.sequences = SEQUENCES_PER_RANK * group.num_ranks
        self.held_out_texts = [
            self.to_devices(batch)
            for batch in self.text.held_out_batches(
                HELD_OUT_BATCHES, self.sequences, config.context + 1
            )
        ]
        self.state = self.training.init(0)
        self.losses: list[float] = []
        self.loads: list[NDArray[np.int32]] = []
        self.held_out: list[tuple[int, float]] = []
        self.num_dropped = 0

    def say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    def to_devices(self, text: ArrayLike) -> jax.Array:
        """A global array of which every process has the whole."""
        text = np.asarray(text)
        sharding = self.training.text_sharding
        return jax.make_array_from_callback(text.shape, sharding, lambda index: text[index])

    def train(self) -> None:
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        self.say(
            f"{num_parameters / 1e6:.1f} M parameters, {self.config.experts} experts per layer on "
            f"{self.group.num_ranks} ranks in {jax.process_count()} process(es), "
            f"{self.text.train.size / 1e6:.1f} MB of text"
        )
        start = time.monotonic()
        steps = range(1, self.args.steps + 1)
        held_out_every = max(10, -(-self.args.steps // HELD_OUT_TIMES))
        with tqdm(steps, unit="step", disable=jax.process_index() != 0) as progress:
            for step in progress:
                text = self.text.batch(step, self.sequences, self.config.context + 1)
                self.state, metrics = self.training.step(self.state, self.to_devices(text))
                self.losses.append(float(metrics.loss))
                self.loads.append(np.asarray(metrics.load))
                self.num_dropped += int(metrics.num_dropped)
                progress.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if step % held_out_every == 0 or step == self.args.steps:
                    loss = self.held_out_loss(self.args.implementation)
                    self.held_out.append((step, loss))
        seconds = time.monotonic() - start
        self.say(
            f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, held-out "
            f"{self.held_out[-1][1]:.3f} nats per byte, in {seconds:.0f} s with compilation"
        )

    def held_out_loss(self, implementation: nn.Implementation) -> float:
        losses = [
            float(self.training.evaluate(self.state, text, implementation=implementation).loss)
            for text in self.held_out_texts
        ]
        return float(np.mean(losses))

    def compare_with_reference(self) -> bool:
        """Whether library and reference give the same held-out loss."""
        library = self.held_out_loss("smfree")
        reference = self.held_out_loss("reference")
        same = abs(library - reference) <= TOLERANCE * abs(reference)
        self.say(
            f"held-out loss through the library {library:.7f}, through the reference "
            f"{reference:.7f}: {'equal to rounding' if same else 'THEY DIFFER'}"
        )
        return same

    def sample(self) -> None:
        """Lets every rank continue the start of a held-out window."""
        context = self.config.context
        ep_config = dataclasses.replace(
            self.group.config, max_tokens=context, recv_capacity=None, differentiable=False
        )
        prompts = self.text.held_out_batches(1, self.group.num_ranks, context)[0]
        with smfree.EpGroup.create(self.group.mesh, moe_lm.AXIS, config=ep_config) as group:
            sample = moe_training.make_sampler(group, self.config, self.args.implementation)
            text = np.asarray(sample(self.state, self.to_devices(prompts)))
        prompt, continued = (
            bytes(row.astype(np.uint8)).decode(errors="replace") for row in (prompts[0], text[0])
        )
        self.say(f"--- a prompt from the held-out files\n{prompt}\n--- continued\n{continued}\n---")

    def report(self) -> None:
        """Saves the pictures; raises if anything went wrong in the group."""
        self.group.check()
        stats = "\n".join(f"  {name:24}{n:>20,}" for name, n in self.group.stats().items())
        share = self.num_dropped / sum(int(load.sum()) for load in self.loads)
        self.say(f"dropped in training: {self.num_dropped} copies of rows ({100 * share:.2f} %)")
        self.say(f"the group in this process, forward and backward:\n{stats}")
        if jax.process_index() != 0:
            return
        self.args.out.mkdir(parents=True, exist_ok=True)
        subtitle = (
            f"{self.config.experts} experts, top-{self.config.router.top_k}, on "
            f"{self.group.num_ranks} ranks; dispatch and combine: {self.args.implementation}"
        )
        figures.save_loss_curve(self.args.out / "loss.png", self.losses, self.held_out, subtitle)
        figures.save_expert_load(
            self.args.out / "expert_load.png", self.loads, self.config.router.top_k, subtitle
        )
        self.say(f"pictures in {self.args.out}: loss.png, expert_load.png")


if __name__ == "__main__":
    sys.exit(main())
