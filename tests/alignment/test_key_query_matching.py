"""Key-query matching: what each network is trained for, and which way the queries move."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dskd_lightning.alignment._padding import Rows
from dskd_lightning.alignment.cross_model_attention import AttentionMap
from dskd_lightning.alignment.key_query_matching import (
    AdversarialMatching,
    ConditionalTransport,
    reverse_gradient,
)


def attention(counts=((3, 5), (4, 6)), size=6) -> AttentionMap:
    rows = [Rows.of(torch.arange(2).repeat_interleave(torch.tensor(side)), 2) for side in counts]
    queries = torch.randn(sum(counts[0]), size, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(sum(counts[1]), size, dtype=torch.float64)
    empty = torch.zeros(2, 0, 0)
    return AttentionMap(empty, empty, queries, keys, *rows)


def test_reverse_gradient():
    x = torch.randn(4, requires_grad=True)
    y = reverse_gradient(x, 0.5)
    assert torch.equal(x, y)
    (y * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(x.grad, -0.5 * torch.arange(4.0))


def test_adversarial_trains_both_sides_against_each_other():
    """The discriminator's gradient is that of detached queries; the queries' is the opposite."""
    matching = AdversarialMatching(5, dropout=0.0, reversal=0.7)
    matching.configure(6)
    matching.double()
    given = attention()
    loss, metrics = matching(given)
    discriminator = matching.discriminator

    def bce(queries):
        real, fake = discriminator(given.keys), discriminator(queries)
        return F.binary_cross_entropy_with_logits(
            real, torch.ones_like(real), reduction="sum"
        ) + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="sum")

    parameters = list(discriminator.parameters())
    plain = bce(given.queries)
    torch.testing.assert_close(loss, plain)
    for actual, expected in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True),
        torch.autograd.grad(bce(given.queries.detach()), parameters),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    (reversed_,) = torch.autograd.grad(loss, given.queries)
    (straight,) = torch.autograd.grad(plain, given.queries)
    assert straight.abs().max() > 0
    torch.testing.assert_close(reversed_, -0.7 * straight)
    total, count = metrics["discriminator_accuracy"]
    assert 0 <= total <= count == 18


def test_adversarial_game_moves_queries_to_keys():
    torch.manual_seed(0)
    matching = AdversarialMatching(16, dropout=0.0)
    matching.configure(4)
    shift = torch.nn.Parameter(torch.full((4,), 3.0))
    base, keys = torch.randn(64, 4), torch.randn(64, 4)
    rows = Rows.of(torch.zeros(64, dtype=torch.long), 1)
    empty = torch.zeros(1, 0, 0)
    optimizer = torch.optim.Adam([shift, *matching.parameters()], 0.02)
    for _ in range(300):
        loss, _ = matching(AttentionMap(empty, empty, base + shift, keys, rows, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shift.abs().max() < 1.5


def test_transport_matches_its_formula():
    matching = ConditionalTransport(5, 4, segments=2)
    matching.configure(6)
    matching.double()
    given = attention()
    loss, _ = matching(given)

    def cost(q, k, critic, navigator):
        def unit(network, x):
            y = network(x)
            return y / y.norm(dim=-1, keepdim=True)

        distance = (unit(critic, q)[:, None] - unit(critic, k)[None]).norm(dim=-1)
        affinity = unit(navigator, q) @ unit(navigator, k).T
        return (affinity.softmax(1) * distance).sum(1), (affinity.softmax(0) * distance).sum(0)

    expected = 0.0
    for q, k in zip(given.queries.split([3, 5]), given.keys.split([4, 6]), strict=True):
        there, back = cost(q, k, matching.position_critic, matching.position_navigator)
        expected = expected + 0.5 * (there.sum() + back.sum())
        pooled = [F.adaptive_avg_pool1d(side.T, 2) for side in (q, k)]
        there, back = cost(*pooled, matching.feature_critic, matching.feature_navigator)
        expected = expected + len(q) * 0.5 * (there.mean() + back.mean())
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, given.queries, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    for critic, sign in ((matching.position_critic, -1), (matching.position_navigator, 1)):
        parameters = list(critic.parameters())
        for a, b in zip(
            torch.autograd.grad(loss, parameters, retain_graph=True),
            torch.autograd.grad(expected, parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, sign * b)


def test_transport_is_symmetric_and_skips_empty_examples():
    matching = ConditionalTransport(5, 4, features=False)
    matching.configure(6)
    matching.double()
    given = attention()
    swapped = AttentionMap(given.s2t, given.t2s, given.keys, given.queries, given.teacher, given.student)
    torch.testing.assert_close(matching(given)[0], matching(swapped)[0])
    empty, _ = matching(attention(((0, 2), (3, 0))))
    assert empty == 0


@pytest.mark.parametrize("kind", [AdversarialMatching, ConditionalTransport])
@pytest.mark.parametrize("sizes", [((0, 2), (3, 0)), ((0, 0), (0, 0))], ids=["none with both", "no tokens"])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(kind, sizes):
    matching = kind()
    matching.configure(6)
    matching.double()
    matching(attention(sizes))[0].backward()
    assert all(parameter.grad is not None for parameter in matching.parameters())
