"""Read a model's parts: its head, its embeddings and its decoder's hidden states.

Models run through their decoder alone, so that no ``[rows, length, vocab]`` logits are made;
`Head` then stands for whatever the model does between the final norm and its logits.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from dskd_lightning.errors import UserError
from dskd_lightning.models.effective_weight import effective_bias, effective_weight
from dskd_lightning.models.head_reading import named_scaling, stored_reading
from dskd_lightning.structures import Head, ModelSpace, PaddedStatistics, Side, TokenBatch

__all__ = [
    "base_model",
    "decoder_hidden",
    "decoder_layers",
    "decoder_of",
    "input_embeddings",
    "language_head",
    "model_space",
    "side",
]


def base_model(model: PreTrainedModel | PeftModel) -> Any:
    """The transformers model inside a peft wrapper (adapters stay injected), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def language_head(model: PreTrainedModel | PeftModel) -> Head:
    """The head as one matrix: adapters on it added in, with a graph to their parameters.

    Raises:
        UserError: the model has no output embeddings, or an adapter there that isn't a sum.
    """
    base = base_model(model)
    module = base.get_output_embeddings()
    if module is None:
        raise UserError(f"{type(base).__name__} has no language-model head: use a causal language model.")
    reading = stored_reading(base)
    if reading is None:
        scale, softcap = named_scaling(base.config.get_text_config())
    else:
        scale, softcap = reading.scale, reading.softcap
    return Head(effective_weight(module), effective_bias(module), scale, softcap)


def decoder_of(model: PreTrainedModel | PeftModel) -> Any:
    """The submodule whose last hidden states the head reads."""
    base = base_model(model)
    reading = stored_reading(base)
    return base.get_decoder() if reading is None else base.get_submodule(reading.decoder)


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The decoder's layers, the units in which a model is pruned and sharded.

    Raises:
        UserError: the decoder has no list of as many layers as its configuration says.
    """
    count = base_model(model).config.get_text_config().num_hidden_layers
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(base_model(model)).__name__}: its decoder has no list of {count} layers.")


def input_embeddings(model: PreTrainedModel | PeftModel) -> Tensor:
    """Input embeddings ``[vocab, hidden]``, adapters added in, without any scaling that follows them."""
    return effective_weight(base_model(model).get_input_embeddings())


def decoder_hidden(
    model: PreTrainedModel | PeftModel, batch: TokenBatch, *, padding_too: bool = False
) -> Tensor:
    """Hidden states ``[rows, length, hidden]`` that the head reads, the final norm applied.

    Padding stands behind the tokens, where no token of a causal model looks, and restarting position ids keep
    packed examples apart. So no mask is handed over: attention takes its fast causal form, and transformers
    needn't ask the device for what the mask holds.

    Args:
        model: student or teacher.
        batch: what it reads.
        padding_too: hand the mask over, for those who read the padding's own states: it must not see itself.
    """
    ids, positions = batch.input_ids, batch.position_ids
    config = base_model(model).config.get_text_config()
    if batch.attention_mask is None and is_flash_attention_requested(config):
        # It looks for packed examples in batches of one row alone; in others it would mix them.
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    output = decoder_of(model)(
        input_ids=ids,
        attention_mask=batch.attention_mask if padding_too else None,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
    )
    return output.last_hidden_state.view(*batch.input_ids.shape, -1)


def model_space(model: PreTrainedModel | PeftModel, tokenizer: Any = None) -> ModelSpace:
    """What an objective may know of ``model`` before training.

    Raises:
        UserError: the tokenizer has tokens that the model has no embedding for.
    """
    embeddings = input_embeddings(model)
    if tokenizer is not None and len(tokenizer) > embeddings.shape[0]:
        raise UserError(
            f"The tokenizer '{tokenizer.name_or_path}' has {len(tokenizer)} tokens but the model "
            f"'{base_model(model).config.name_or_path}' has embeddings for {embeddings.shape[0]}: "
            "use the tokenizer that belongs to it."
        )
    return ModelSpace(language_head(model), embeddings, tokenizer)


def side(
    model: PreTrainedModel | PeftModel,
    hidden: Tensor,
    tokens: TokenBatch,
    *,
    padded_statistics: bool = False,
    sampled: bool = False,
) -> Side:
    """One model's view of the response tokens.

    Args:
        model: whose head and embeddings are read.
        hidden: ``[rows, length, hidden]`` of `decoder_hidden`, or ``[n, hidden]`` where the
            response positions were selected already (cached hidden states).
        tokens: the batch that ``hidden`` belongs to.
        padded_statistics: fill `Side.padded`; needs the unselected ``hidden``.
        sampled: the student sampled the responses.

    Raises:
        UserError: padded statistics of cached hidden states were asked for.
    """
    padded = None
    if padded_statistics:
        if hidden.dim() == 2:
            raise UserError(
                "This objective reads statistics of the padded layout, which cached teacher states don't "
                "hold: train without the teacher cache or turn that option of the objective off."
            )
        padded = PaddedStatistics(tokens.input_ids.numel(), hidden.std())
    return Side(
        hidden=hidden if hidden.dim() == 2 else tokens.select(hidden),
        head=language_head(model),
        embeddings=input_embeddings(model),
        ids=tokens.select(tokens.input_ids),
        labels=tokens.select(tokens.labels),
        sequence=tokens.sequence,
        padded=padded,
        sampled=sampled,
        extent=tokens.extent,
    )
