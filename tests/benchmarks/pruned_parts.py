"""What a model loses before training by fewer layers, narrower feed-forward, fewer heads or a narrower whole.

Run: ``python tests/benchmarks/pruned_parts.py [--source demo --data demo]``. Each way of pruning is tried at
about the parameters that one and two groups of heads (a key-value head and the heads that read it) of every
layer take; what goes is what adds least on 16 records, the root mean square of what is read times the norm of
the weights that read it; 16 others measure. Groups and hidden dimensions are set to zero, which gives what a
model without them would: the package cuts layers and feed-forward units alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from _measure import environment, print_table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from dskd_lightning.models.layer_choice import rank_layers, response_loss  # noqa: E402
from dskd_lightning.models.output import decoder_hidden, decoder_layers  # noqa: E402
from dskd_lightning.models.pruning import prune_feed_forward, prune_layers  # noqa: E402
from dskd_lightning.planning.pruned_sizes import PruningStudy  # noqa: E402
from dskd_lightning.structures import TokenBatch  # noqa: E402

COLUMNS = ("pruned", "parameters saved", "perplexity")


def squares(model: PreTrainedModel, modules: list[nn.Module], batches: list[TokenBatch]) -> list[Tensor]:
    """Sums over real tokens of the squares of what each module reads."""
    sums: dict[nn.Module, Tensor] = {}
    real = torch.ones(0)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[module] = sums.get(module, 0) + args[0][real].float().square().sum(0)

    hooks = [module.register_forward_pre_hook(add) for module in modules]
    for batch in batches:
        real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        real = real.bool()
        decoder_hidden(model, batch)
    for hook in hooks:
        hook.remove()
    return [sums[module] for module in modules]


@torch.no_grad()
def without_groups(model: PreTrainedModel, count: int, batches: list[TokenBatch]) -> int:
    """In place, ``count`` groups of heads of each layer gone; how many parameters that saves."""
    config, saved = model.config, 0
    groups = config.num_key_value_heads
    outward = [layer.self_attn.o_proj for layer in decoder_layers(model)]
    for layer, read in zip(decoder_layers(model), squares(model, outward, batches), strict=True):
        weight = layer.self_attn.o_proj.weight
        scores = (read * weight.float().square().sum(0)).view(groups, -1).sum(1)
        weight.view(len(weight), groups, -1)[:, scores.topk(count, largest=False).indices] = 0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            saved += getattr(layer.self_attn, name).weight.numel() * count // groups
    return saved


@torch.no_grad()
def without_dimensions(model: PreTrainedModel, count: int, batches: list[TokenBatch]) -> int:
    """In place, the model narrower by ``count`` hidden dimensions; how many parameters that saves."""
    norms, readers = [], []
    for layer in decoder_layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        readers += [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    norms, readers = [*norms, model.model.norm], [*readers, [model.lm_head]]
    width = model.config.hidden_size
    scores = torch.zeros(width, device=model.device)
    for norm, by, read in zip(norms, readers, squares(model, norms, batches), strict=True):
        weights = torch.stack([linear.weight.float().square().sum(0) for linear in by]).sum(0)
        found = read * norm.weight.float().square() * weights
        scores += found / found.sum()
    gone = scores.topk(count, largest=False).indices
    model.get_input_embeddings().weight[:, gone] = 0
    for layer in decoder_layers(model):
        layer.self_attn.o_proj.weight[gone] = 0
        layer.mlp.down_proj.weight[gone] = 0
    for norm in norms:
        norm.weight.mul_(((width - count) / width) ** 0.5)  # the mean is over fewer
    return sum(p.numel() // width * count for p in model.parameters())


def rows(study: PruningStudy) -> Iterator[tuple[str, str, str]]:
    """The table's rows, those of about the same size one below the other."""
    model, choosing, measuring = study.model, study._choosing, study._measuring
    config, total = model.config, sum(p.numel() for p in model.parameters())

    def row(name: str, cut: PreTrainedModel, saved: int | None = None) -> tuple[str, str, str]:
        saved = total - sum(p.numel() for p in cut.parameters()) if saved is None else saved
        loss = torch.tensor(response_loss(cut, measuring))
        return name, f"{saved / total:.1%}", f"{loss.exp():,.1f}"

    def zeroed(name: str, zero: Callable[..., int], count: int) -> tuple[str, str, str]:
        cut = copy.deepcopy(model)
        return row(f"{count} {name}", cut, zero(cut, count, choosing))

    yield row("nothing", model, 0)
    ranking = rank_layers(model, "influence", choosing)
    layers, width = len(ranking.scores), config.intermediate_size
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    attention = sum(p.numel() for p in decoder_layers(model)[0].self_attn.parameters())
    groups = config.num_key_value_heads
    for count in range(1, groups):
        yield zeroed(f"of {groups} groups of heads a layer", without_groups, count)
        size = attention * count / groups * layers
        for gone in sorted({int(size / layer), -int(-size // layer)} - {0}):
            yield row(f"{gone} layers", prune_layers(model, ranking.kept(layers - gone)))
        units = round(size / layers / 3 / config.hidden_size)
        yield row(f"{units} feed-forward units a layer", prune_feed_forward(model, width - units, choosing))
        yield zeroed("hidden dimensions", without_dimensions, round(size / total * config.hidden_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="demo", help="a model of Llama's parts")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--max_length", type=int, default=256)
    a = parser.parse_args()
    study = PruningStudy(a.source, a.data, examples=32, max_length=a.max_length, dtype="float32")
    print(environment())
    print_table(f"{a.source}, perplexity of 16 records before training", COLUMNS, list(rows(study)))


if __name__ == "__main__":
    main()
