# SPDX-License-Identifier: Apache-2.0
"""One training step, the held-out loss and sampling: each a function compiled for all devices.

The parts that communicate are inside ``shard_map``; gradients are taken around it, and the
optimizer runs on global arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import moe_lm
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn

LEARNING_RATE = 6e-3
BALANCE_LOSS = 1e-2  # weight of the load-balancing loss, mean over the layers
BALANCE_RATE = 5e-3  # step of the routers' balance bias
SAMPLE_BYTES = 192
TEMPERATURE = 0.6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: moe_lm.Params
    optimizer: Any
    balance_bias: Array  # [layers, E], updated by rule, not by gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one batch over all ranks."""

    loss: Array  # [], nats per byte
    load: Array  # int32 [layers, E], rows per expert
    num_dropped: Array  # int32 []


WIRES = {"float32": None, "fp8": smfree.Fp8()}


def group_config(
    config: moe_lm.ModelConfig, num_ranks: int, sequences: int, wire: str
) -> smfree.EpConfig:
    """For ``sequences`` per rank, with room for twice the rows of a balanced routing."""
    rows = sequences * config.context
    experts_per_rank = config.experts // num_ranks
    capacity = 2 * rows * config.router.top_k + experts_per_rank * moe_lm.EXPERT_ALIGNMENT
    return smfree.EpConfig(
        num_experts=config.experts,
        top_k=config.router.top_k,
        hidden=config.hidden,
        max_tokens=rows,
        dtype=jnp.float32,
        recv_capacity=capacity // moe_lm.EXPERT_ALIGNMENT * moe_lm.EXPERT_ALIGNMENT,
        expert_alignment=moe_lm.EXPERT_ALIGNMENT,
        overflow="drop",
        wire=WIRES[wire],
    )


class Training:
    """The functions for one mesh, group and model; ``text`` is int32 [sequences, S + 1]."""

    def __init__(
        self,
        group: smfree.EpGroup,
        config: moe_lm.ModelConfig,
        *,
        steps: int,
        implementation: nn.Implementation,
    ) -> None:
        self.group = group
        self.config = config
        self.implementation = implementation
        self.optimizer = _optimizer(steps)
        self.shardings = self._state_shardings()
        self.text_sharding = self._sharding(P(moe_lm.AXIS))
        replicated = self._sharding(P())
        self.init = jax.jit(self._init, out_shardings=self.shardings)
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(self.shardings, replicated)
        )
        self.evaluate = jax.jit(self._evaluate, static_argnames="implementation")

    @property
    def mesh(self) -> Mesh:
        return self.group.mesh

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _init(self, seed: Array) -> State:
        params = moe_lm.init(jax.random.key(seed), self.config)
        bias = jnp.zeros((self.config.layers, self.config.experts))
        return State(params, self.optimizer.init(params), bias)

    def _state_shardings(self) -> Any:
        """A `State` of shardings; the optimizer's state lies where its parameters do."""
        state = jax.eval_shape(self._init, 0)
        params = jax.tree.map(self._sharding, moe_lm.specs(state.params))
        replicated = self._sharding(P())
        optimizer = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            state.optimizer,
            params,
            transform_non_params=lambda _: replicated,
        )
        return dataclasses.replace(
            state, params=params, optimizer=optimizer, balance_bias=replicated
        )

    def _metrics_of(self, implementation: nn.Implementation) -> Any:
        """``(params, balance_bias, text) -> (loss to minimise, Metrics)`` on global arrays."""

        def on_each_rank(params: moe_lm.Params, bias: Array, text: Array) -> Any:
            _, logits, aux = moe_lm.forward(
                self.group.token(),
                params,
                bias,
                text[:, :-1],
                config=self.config,
                implementation=implementation,
            )
            losses = moe_lm.loss(logits, text[:, 1:]), aux.load_balancing_loss.mean()
            loss, balance_loss = jax.lax.pmean(losses, moe_lm.AXIS)
            load, num_dropped = jax.lax.psum((aux.load, aux.num_dropped.sum()), moe_lm.AXIS)
            return loss + BALANCE_LOSS * balance_loss, Metrics(loss, load, num_dropped)

        specs = moe_lm.specs(jax.eval_shape(self._init, 0).params)
        return jax.shard_map(
            on_each_rank, mesh=self.mesh, in_specs=(specs, P(), P(moe_lm.AXIS)), out_specs=P()
        )

    def _evaluate(self, state: State, text: Array, *, implementation: nn.Implementation) -> Metrics:
        loss = self._metrics_of(implementation)
        metrics: Metrics = loss(state.params, state.balance_bias, text)[1]
        return metrics

    def _step(self, state: State, text: Array) -> tuple[State, Metrics]:
        loss = self._metrics_of(self.implementation)
        gradient = jax.grad(loss, has_aux=True)
        gradients, metrics = gradient(state.params, state.balance_bias, text)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        update_bias = functools.partial(nn.update_balance_bias, rate=BALANCE_RATE)
        bias = jax.vmap(update_bias)(state.balance_bias, metrics.load)
        return State(params, optimizer, bias), metrics


def make_sampler(
    group: smfree.EpGroup, config: moe_lm.ModelConfig, implementation: nn.Implementation
) -> Callable[[State, Array], Array]:
    """``(state, prompts) -> text``: every rank continues a prompt of its own.

    Shapes: ``prompts`` int32 [R, S] -> int32 [R, SAMPLE_BYTES]. ``group`` takes S rows per rank.
    """

    def on_each_rank(params: moe_lm.Params, bias: Array, prompt: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(moe_lm.AXIS))

        def next_byte(carry: Any, key: Array) -> Any:
            token, window = carry
            token, logits, _ = moe_lm.forward(
                token, params, bias, window, config=config, implementation=implementation
            )
            byte = jax.random.categorical(key, logits[:, -1] / TEMPERATURE)
            return (token, jnp.concatenate([window[:, 1:], byte[:, None]], axis=1)), byte[0]

        text: Array
        _, text = jax.lax.scan(
            next_byte, (group.token(), prompt), jax.random.split(key, SAMPLE_BYTES)
        )
        return text[None]

    def sample(state: State, prompts: Array) -> Array:
        specs = moe_lm.specs(state.params)
        continue_prompts = jax.shard_map(
            on_each_rank,
            mesh=group.mesh,
            in_specs=(specs, P(), P(moe_lm.AXIS)),
            out_specs=P(moe_lm.AXIS),
        )
        text: Array = continue_prompts(state.params, state.balance_bias, prompts)
        return text

    return jax.jit(sample, out_shardings=NamedSharding(group.mesh, P()))


def _optimizer(steps: int) -> optax.GradientTransformation:
    warmup = min(20, max(1, steps // 5))
    rate = optax.warmup_cosine_decay_schedule(
        LEARNING_RATE / 10, LEARNING_RATE, warmup, max(steps, warmup + 1), LEARNING_RATE / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01)
    )
