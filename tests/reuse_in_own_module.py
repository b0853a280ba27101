"""`DSKDObjective` alone in somebody else's LightningModule."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dskd_lightning import DSKDObjective, Head, ModelSpace, Side


def model(hidden: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


class Mine(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = model(32).requires_grad_(False).eval(), model(16)
        self.objective = DSKDObjective(temperature=2.0)
        spaces = [
            ModelSpace(Head(m.lm_head.weight), m.model.embed_tokens.weight)
            for m in (self.student, self.teacher)
        ]
        self.objective.configure(*spaces)

    def side(self, m: LlamaForCausalLM, ids: torch.Tensor) -> Side:
        hidden = m.model(ids[:, :-1]).last_hidden_state.flatten(0, 1)
        rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1] - 1)
        read, predicted = ids[:, :-1].flatten(), ids[:, 1:].flatten()
        return Side(hidden, Head(m.lm_head.weight), m.model.embed_tokens.weight, read, predicted, rows)

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.objective(self.side(self.student, ids), self.side(self.teacher, ids))
        return output.loss / output.tokens

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


if __name__ == "__main__":
    L.seed_everything(0)
    mine, data = Mine(), torch.randint(64, (32, 12))
    before = float(mine.training_step(data))
    L.Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        mine, DataLoader(data, 8)
    )
    print(f"loss {before:.3f} -> {float(mine.training_step(data)):.3f}")
