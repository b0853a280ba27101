"""Which layers pruning keeps, against models whose layers are known to matter or not."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import make_model
from model_families import CONFIGS, from_config, separate_rows
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
    Phi3Config,
)

from dskd_lightning import PruneSpec, StudentSpec, UserError
from dskd_lightning.models.layer_choice import block_influence, decide_layers, rank_layers, response_loss
from dskd_lightning.models.output import decoder_layers
from dskd_lightning.models.pruning import prune_feed_forward, prune_layers
from dskd_lightning.models.student import build_student
from dskd_lightning.structures import TokenBatch

VOCAB = 60


def batch(seed: int = 0) -> TokenBatch:
    ids = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(8) < 3, -100)
    mask = torch.ones_like(ids)
    mask[1, 6:], labels[1, 6:] = 0, -100
    response = (labels.flatten() != -100).nonzero()[:, 0]
    return TokenBatch(ids, labels, mask, torch.arange(8).expand(3, 8), response, response // 8)


@pytest.fixture
def model():
    """Layers 1 and 4 of six add next to nothing; layer 2 adds most."""
    torch.manual_seed(0)
    made = make_model(VOCAB, hidden=16, layers=6).eval()
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(made)):
            factor = {1: 1e-3, 2: 30.0, 4: 2e-3}.get(index, 5.0)
            layer.mlp.down_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.mul_(factor)
    return made


def hidden_states(model, tokens: TokenBatch) -> list[torch.Tensor]:
    """What goes into each layer and comes out of the last, before the final norm."""
    found = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kw: found.append((*args, *kw.values())[0]), with_kwargs=True
        )
        for layer in decoder_layers(model)
    ]
    norm = model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(tokens.input_ids, attention_mask=tokens.attention_mask)
    for hook in [*hooks, norm]:
        hook.remove()
    return found


def test_influence_is_one_minus_the_mean_cosine_over_real_tokens(model) -> None:
    batches = [batch(0), batch(1)]
    expected = torch.zeros(6, dtype=torch.float64)
    tokens = 0
    for tokens_of in batches:
        with torch.no_grad():
            states = [h[tokens_of.attention_mask.bool()].double() for h in hidden_states(model, tokens_of)]
        tokens += len(states[0])
        for layer in range(6):
            expected[layer] += (1 - F.cosine_similarity(states[layer], states[layer + 1], dim=-1)).sum()
    actual = torch.tensor(block_influence(model, batches), dtype=torch.float64)
    torch.testing.assert_close(actual, expected / tokens, rtol=1e-4, atol=1e-6)


def test_response_loss_is_the_models_own(model) -> None:
    tokens = batch()
    with torch.no_grad():
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.labels.flatten(), ignore_index=-100)
    assert response_loss(model, [tokens]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("by", ["influence", "perplexity"])
def test_layers_that_do_nothing_go_first(model, by: str) -> None:
    ranking = rank_layers(model, by, [batch()], smallest=4)
    kept, scores = ranking.kept(4), ranking.scores
    if by == "influence":
        assert kept == [0, 2, 3, 5]
        assert scores[2] == max(scores)
    else:
        left = [i for i in range(6) if i not in kept]
        greedy = list(range(6))
        for _ in range(2):
            losses = {
                i: response_loss(prune_layers(model, [j for j in greedy if j != i]), [batch()])
                for i in greedy
            }
            greedy.remove(min(losses, key=losses.__getitem__))
        assert kept == greedy
        assert [score is not None for score in scores] == [i in left for i in range(6)]
    assert response_loss(model, [batch()]) == response_loss(model, [batch()])  # and all layers run again


TUPLES = {
    "bloom": BloomConfig(vocab_size=97, hidden_size=16, n_layer=4, n_head=2),
    "falcon": FalconConfig(vocab_size=97, hidden_size=16, num_hidden_layers=4, num_attention_heads=2),
    "gpt_neo": GPTNeoConfig(
        vocab_size=97, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]],
        max_position_embeddings=64, window_size=4,
    ),
    "mpt": MptConfig(vocab_size=97, d_model=16, n_layers=4, n_heads=2, max_seq_len=64),
}  # fmt: skip
"""Of families whose layers return a tuple."""


@pytest.mark.parametrize("name", TUPLES)
def test_layers_that_return_a_tuple_are_skipped_as_if_they_were_cut_out(name: str) -> None:
    model, tokens = from_config(TUPLES[name]), separate_rows()
    ranking = rank_layers(model, "perplexity", [tokens], smallest=2)
    first, second = ranking.dropped
    for gone in ([first], [first, second]):
        kept = [i for i in range(4) if i not in gone]
        loss = response_loss(prune_layers(model, kept), [tokens])
        assert ranking.scores[gone[-1]] == pytest.approx(loss, rel=1e-5)


def test_the_choice_is_written_into_the_spec_and_logged(model_folder, caplog) -> None:
    folder = model_folder(layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    spec = StudentSpec(folder, prune=PruneSpec(layers=3))
    asked = []

    def calibration(of, count):
        asked.append((of.source, count))
        return [batch()]

    with caplog.at_level(logging.INFO, logger="dskd_lightning"):
        decided = decide_layers(spec, calibration)
    assert decided.prune.layers == rank_layers(model, "influence", [batch()]).kept(3)
    assert asked == [(folder, 32)]
    assert "perplexity of 32 calibration responses" in caplog.text
    assert spec.prune.layers == 3
    assert decide_layers(decided, None) is decided
    with pytest.raises(UserError, match=r"prune.by: influence.*datamodule"):
        decide_layers(spec, None)
    with pytest.raises(UserError, match="new weights"):
        decide_layers(StudentSpec(folder, prune=PruneSpec(layers=3), random_init=True), calibration)
    student, _ = build_student(spec, calibration)
    assert len(decoder_layers(student)) == 3


def test_a_width_and_a_number_of_examples_are_checked_before_anything_is_measured(model_folder) -> None:
    spec = StudentSpec(model_folder(layers=4), prune=PruneSpec(layers=3, intermediate_size=33))
    asked = []
    with pytest.raises(UserError, match="between 1 and the model's 32"):
        decide_layers(spec, lambda *_: asked.append(1))
    assert not asked
    for count in (0, -3):
        with pytest.raises(UserError, match=f"prune.calibration: {count}` must be at least 1"):
            PruneSpec(layers=3, calibration=count)
    assert PruneSpec(layers=3, by="even", calibration=0)


def test_units_are_kept_by_what_they_add(model) -> None:
    """A unit that is never on goes, however large its weights are."""
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.mlp.gate_proj.weight[3] = 0.0
            layer.mlp.up_proj.weight[3] = 50.0
    width = model.config.intermediate_size - 1
    tokens = batch()
    narrow = prune_feed_forward(model, width, [tokens])
    with torch.no_grad():
        torch.testing.assert_close(narrow(tokens.input_ids).logits, model(tokens.input_ids).logits)
        by_norm = prune_feed_forward(model, width)
        assert not torch.allclose(by_norm(tokens.input_ids).logits, model(tokens.input_ids).logits)


SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
WIDTHS = {
    "tokens in one dimension": (CONFIGS["opt"], 40),
    "as wide as the states": (LlamaConfig(**SIZES, hidden_size=16, intermediate_size=16), 16),
    "half as wide": (LlamaConfig(**SIZES, hidden_size=16, intermediate_size=8), 8),
    "fused, as wide": (Phi3Config(**SIZES, hidden_size=16, intermediate_size=16), 16),
    "fused, half as wide": (Phi3Config(**SIZES, hidden_size=16, intermediate_size=8), 8),
    "plain, as wide": (GPTNeoConfig(
        vocab_size=97, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        intermediate_size=16,
    ), 16),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDTHS)
def test_units_that_are_never_read_go_first_whatever_the_sizes(case: str, tmp_path) -> None:
    config, width = WIDTHS[case]
    model, tokens = from_config(config), separate_rows()
    with torch.no_grad():
        for layer in decoder_layers(model):
            named = dict(layer.named_parameters())
            out = next(n for n in ("mlp.down_proj", "mlp.c_proj", "fc2") if f"{n}.weight" in named)
            named[f"{out}.weight"][:, [1, 5]] = 0.0
        expected = tokens.select(model(tokens.input_ids, attention_mask=tokens.attention_mask).logits)
        narrow = prune_feed_forward(model, width - 2, [tokens])
        narrow.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        found = tokens.select(again(tokens.input_ids, attention_mask=tokens.attention_mask).logits)
    torch.testing.assert_close(found, expected)
