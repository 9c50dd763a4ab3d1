"""A Hugging Face encoder that classifies sentences, helped by guessing masked words.

    python examples/text_objective.py

The sentences are made up from a small grammar and the weights are random, so that nothing is downloaded. Few sentences
have a label; all can have words masked, which is what an auxiliary objective is good for.
"""

from __future__ import annotations

import torch
from sidetask_core import Batch, SplitModel, Step, Task
from sidetask_ial.ial import ial
from torch import Tensor, nn
from transformers import BertConfig, BertModel

SUBJECTS = ["the cat", "the old dog", "a bird", "my neighbour", "the teacher"]
VERBS = {"glad": ["praises", "loves", "enjoys", "likes"], "cross": ["hates", "dreads", "resents", "dislikes"]}
OBJECTS = ["the garden", "this long walk", "every song", "the cold rain", "a warm soup"]
PHRASES = [*SUBJECTS, *VERBS["glad"], *VERBS["cross"], *OBJECTS]
WORDS = ["[pad]", "[cls]", "[mask]", *sorted({word for phrase in PHRASES for word in phrase.split()})]
LENGTH = 9


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Word ids ``[count, LENGTH]`` and whether the sentence is cross ``[count]``."""
    rows, labels = [], []
    for _ in range(count):
        label, *picks = torch.randint(0, 1 << 20, (4,), generator=generator).tolist()
        verbs = VERBS["cross" if label % 2 else "glad"]
        pools = zip((SUBJECTS, verbs, OBJECTS), picks, strict=True)
        subject, verb, thing = (pool[pick % len(pool)] for pool, pick in pools)
        ids = [1, *(WORDS.index(word) for word in f"{subject} {verb} {thing}".split())]
        rows.append(ids + [0] * (LENGTH - len(ids)))
        labels.append(label % 2)
    return torch.tensor(rows), torch.tensor(labels)


class Encoder(nn.Module):
    """BERT, as a module from word ids to states ``[N, L, C]``."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state


class First(nn.Linear):
    """Logits from the state of the first position."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states[:, 0])


def words(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every position, ``[N, L]``."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), target.clamp(min=0), reduction="none")


def main() -> float:
    """Train on few labels; accuracy on new sentences."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tasks = [
        Task("mood", nn.CrossEntropyLoss(reduction="none"), valid=lambda y: y >= 0),
        Task("masked", words, valid=lambda y: y >= 0, primary=False),
    ]
    model = SplitModel(Encoder(), {"mood": First(32, 2), "masked": nn.Linear(32, len(WORDS))})
    step = Step(model, tasks, ial(tasks))
    optimizer = torch.optim.AdamW(step.parameters(), lr=3e-3)

    ids, mood = sentences(640, generator)
    mood[64:] = -1  # unlabelled
    for _ in range(8):
        for rows in torch.randperm(len(ids), generator=generator).split(64):
            hidden = (torch.rand(len(rows), LENGTH, generator=generator) < 0.2) & (ids[rows] > 2)
            batch = Batch(
                ids[rows].masked_fill(hidden, WORDS.index("[mask]")),
                {"mood": mood[rows], "masked": ids[rows].masked_fill(~hidden, -1)},
            )
            optimizer.zero_grad()
            report = step.backward(batch)
            optimizer.step()
    print("losses:", {name: round(loss.item(), 3) for name, loss in report.losses.items()})

    new, truth = sentences(200, generator)
    with torch.no_grad():
        accuracy = (step.export().eval()(new)["mood"].argmax(1) == truth).float().mean().item()
    print(f"accuracy on new sentences, from 64 labels: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
