# SPDX-License-Identifier: Apache-2.0
"""Programs that call one MoE layer several times in no order of data: what any user may write.

Each takes ``layer(x, kernel) -> rows`` and its arguments, and returns what it computes. So it can
be run with the library and with the reference, in one process and in several.
"""

import functools

import jax
import jax.numpy as jnp

import jax_smfree as smfree
from support import block


def program_of(program, ops, token, problem):
    """``program`` as a jitted function of ``problem.arrays``; each call begins with ``token()``."""

    def local(*arrays):
        return block(ops, token(), *arrays)[1]

    sharded = jax.shard_map(
        local, mesh=problem.mesh, in_specs=problem.specs, out_specs=problem.rows
    )

    def run(x, topk_idx, topk_weights, kernel):
        return program(lambda x, kernel: sharded(x, topk_idx, topk_weights, kernel), x, kernel)

    return jax.jit(run)


def loss_of(layer, x):
    return lambda kernel: jnp.mean(layer(x, kernel) ** 2)


def one_call(layer, x, kernel):
    return layer(x, kernel)


def one_gradient(layer, x, kernel):
    return jax.grad(loss_of(layer, x))(kernel)


def eight_inputs(layer, x, kernel):
    return [layer(factor * x, kernel) for factor in range(1, 9)]


def eight_gradients(layer, x, kernel):
    return [jax.grad(loss_of(layer, factor * x))(kernel) for factor in range(1, 9)]


def jitted_layer_called_twice(layer, x, kernel):
    layer = jax.jit(layer)
    return layer(x, kernel) + layer(-x, kernel)


def value_and_gradient_apart(layer, x, kernel):
    loss = loss_of(layer, x)
    return loss(kernel), jax.grad(loss)(kernel)


def two_losses(layer, x, kernel):
    losses = loss_of(layer, x), loss_of(layer, jnp.sin(x))
    return [jax.value_and_grad(loss)(kernel) for loss in losses]


def policy_and_reference_model(layer, x, kernel):
    def loss(kernel, frozen):
        return jnp.mean((layer(x, kernel) - jax.lax.stop_gradient(layer(x, frozen))) ** 2)

    return jax.value_and_grad(loss)(kernel, 0.5 * kernel)


def unrolled_accumulation(layer, x, kernel):
    """Of gradients over micro-batches."""
    batches = [x, 2 * x, jnp.cos(x)]
    return sum(jax.grad(loss_of(layer, batch))(kernel) for batch in batches)


def custom_vjp_that_recomputes(layer, x, kernel):
    @jax.custom_vjp
    def again(x, kernel):
        return layer(x, kernel)

    def forward(x, kernel):
        return layer(x, kernel), (x, kernel)

    def backward(residuals, cotangent):
        return jax.vjp(layer, *residuals)[1](cotangent)

    again.defvjp(forward, backward)
    return jax.value_and_grad(lambda k: jnp.mean(again(again(x, k), k) ** 2))(kernel)


def vjp_called_twice(layer, x, kernel):
    out, vjp = jax.vjp(layer, x, kernel)
    return vjp(out), vjp(jnp.ones_like(out))


def linearised_called_twice(layer, x, kernel):
    out, tangent = jax.linearize(layer, x, kernel)
    return out, tangent(x, kernel), tangent(jnp.ones_like(x), 0 * kernel)


def two_calls_in_a_scan(layer, x, kernel):
    def loss(kernel):
        def body(x, factor):
            return layer(factor * x, kernel) + layer(-x, kernel), None

        out, _ = jax.lax.scan(body, x, jnp.arange(1.0, 4.0))
        return jnp.mean(out**2)

    return jax.value_and_grad(loss)(kernel)


def checkpoint_of_the_loss(layer, x, kernel):
    @jax.checkpoint
    def loss(kernel):
        return jnp.mean(layer(x, kernel) * layer(-x, kernel))

    return loss(kernel), jax.grad(loss)(kernel), jax.grad(loss)(2 * kernel)


def checkpoint_that_saves(layer, x, kernel):
    save = functools.partial(jax.checkpoint, policy=smfree.save_comm_policy)
    return checkpoint_of_the_loss(save(layer), x, kernel)


def steps_in_a_loop(layer, x, kernel, number=300):
    """Of training, each with two gradients and a value."""

    def body(kernel, factor):
        gradients = [jax.grad(loss_of(layer, f * x))(kernel) for f in (factor, -factor)]
        return kernel - 0.01 * sum(gradients), loss_of(layer, x)(kernel)

    return jax.lax.scan(body, kernel, jnp.linspace(0.5, 1.5, number))


def second_order(layer, x, kernel):
    """Hessian-vector products of two losses."""

    def product(loss):
        return jax.jvp(jax.grad(loss), (kernel,), (jnp.sin(kernel),))[1]

    return product(loss_of(layer, x)), product(loss_of(layer, -x))


def gradient_of_a_gradient(layer, x, kernel):
    def norm(kernel):
        return jnp.sum(jax.grad(loss_of(layer, x))(kernel) ** 2) + loss_of(layer, x)(kernel)

    return jax.grad(norm)(kernel)


PROGRAMS = [
    eight_inputs,
    eight_gradients,
    jitted_layer_called_twice,
    value_and_gradient_apart,
    two_losses,
    policy_and_reference_model,
    unrolled_accumulation,
    custom_vjp_that_recomputes,
    vjp_called_twice,
    linearised_called_twice,
    two_calls_in_a_scan,
    checkpoint_of_the_loss,
    checkpoint_that_saves,
    second_order,
    gradient_of_a_gradient,
]
