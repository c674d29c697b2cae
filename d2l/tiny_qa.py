"""The tiny base that answers questions: a Llama trained on the closed encyclopedia, document in
prompt.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

from .data.encyclopedia import KINDS, EncyclopediaGenerator
from .data.lexicon_closed import closed_words
from .data.record import Record
from .lm.base import render_chat
from .lm.tiny import WINDOW_TOK, build_model, build_tokenizer, look_back
from .tiny_training import Row, TinyTraining, exact, pad_rows

N_MEASURED = 100
RECIPE = TinyTraining(
    growing=800, settling=450, batch=32, n_levels=3, earned_at=0.85, learning_rate=2e-3
)


@dataclasses.dataclass
class QaTask:
    """Questions about documents of up to ``facts[0]`` facts at level 0, ``facts[-1]`` at level 1.

    A row holds a document and ``n_questions`` questions, each in a turn of its own.  From ``mixed``
    on, a quarter of the documents have questions of all kinds, and one row in ``bare_every`` has no
    document, which makes every question unanswerable.  All names of the training split, all words
    and all forms are used: the base knows the language, what it has to learn in an experiment are
    documents.  ``rival_share`` of the batches have documents with several entities of one type,
    where the attribute alone does not give the answer away.
    """

    name: str = "tiny-qa"
    width: int = 128
    n_layers: int = 3
    n_heads: int = 8
    facts: tuple[int, ...] = (2, 4, 8, 16)
    n_questions: int = 5
    rival_share: float = 0.25
    mixed: float = 0.5
    bare_every: int = 16

    def __post_init__(self) -> None:
        self.tokenizer: Any = build_tokenizer(closed_words())
        self._train = {rivals: self._generator("train", rivals=rivals) for rivals in (True, False)}

    def _generator(self, split: str, *, rivals: bool, forms: str = "all") -> EncyclopediaGenerator:
        return EncyclopediaGenerator(
            split, vocabulary="closed", words="all", forms=forms, distractors=0.7, rivals=rivals
        )

    def build(self, seed: int) -> Any:
        """Return the untrained model, whose first layer looks back already."""
        model = build_model(
            seed,
            self.tokenizer,
            width=self.width,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            rope_theta=1e5,
        )
        look_back(model, (1, 2, 3, 5))
        return model

    def rows(self, rng: random.Random, level: float, n_rows: int) -> list[Row]:
        """Draw documents of one number of facts each with its questions."""
        most = self.facts[round(level * (len(self.facts) - 1))]
        n_facts = most if rng.random() < 0.5 else rng.randint(1, most)
        generator = self._train[rng.random() < self.rival_share]
        rows = []
        for i in range(max(8, min(n_rows, 16 * n_rows // n_facts))):
            mixed = level >= self.mixed and i % 4 == 0
            record = generator.sample(
                rng, n_facts, self.n_questions, KINDS if mixed else ("recall",)
            )
            bare = level >= self.mixed and i % self.bare_every == 1
            rows.append(self.row(record, document=not bare))
        return rows

    def row(self, record: Record, *, document: bool = True, answer: bool | None = None) -> Row:
        """Put a record into the chat format, the questions one after another.

        Without the document the answer is *unknown*, unless ``answer`` asks for the record's own.
        """
        known = document if answer is None else answer
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for question in record.questions:
            text = question.text if ids or not document else f"{record.document}\n\n{question.text}"
            turn = render_chat(self.tokenizer, text)
            ids += turn[3:] if ids else turn
            said = question.answers[0] if known else "unknown"
            reply = self.tokenizer(said, add_special_tokens=False).input_ids
            spans.append((len(ids), len(ids) + len(reply) + 1))
            ids += [*reply, self.tokenizer.eos_token_id]
        return ids, spans

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any]:
        """Return exact match on held-out documents: by facts, by kind at 8 facts, and without."""
        by_facts = {n: self.accuracy(model, n) for n in (1, *self.facts)}
        by_kind = {k: self.accuracy(model, 8, k, rivals=k == "numeric") for k in KINDS}
        return {
            "by_facts": by_facts,
            "by_kind": by_kind,
            "rivals": self.accuracy(model, 8, rivals=True),
            "without": self.accuracy(model, 8, document=False),
        }

    @torch.no_grad()
    def accuracy(
        self,
        model: Any,
        n_facts: int,
        kind: str = "recall",
        *,
        document: bool = True,
        rivals: bool = False,
        forms: str = "all",
        n: int = N_MEASURED,
        seed: int = 0,
    ) -> float:
        """Return exact match over one question each about ``n`` documents of the test split."""
        generator = self._generator("test", rivals=rivals, forms=forms)
        rng = random.Random(f"measure/{n_facts}/{kind}/{seed}")
        hits: list[bool] = []
        for start in range(0, n, 20):
            records = [
                generator.sample(rng, n_facts, 1, (kind,)) for _ in range(start, min(n, start + 20))
            ]
            rows = [self.row(record, document=document, answer=True) for record in records]
            ids, _ = pad_rows(rows, self.tokenizer.pad_token_id, str(model.device))
            hits += exact(model(input_ids=ids, use_cache=False).logits[:, :-1], ids, rows)
        return sum(hits) / n

    def card(self, model: Any, measured: dict[str, Any]) -> str:
        """Describe the trained base in Markdown, from what its training measured."""
        found = measured["accuracy"]
        n_params = sum(p.numel() for p in model.parameters())
        lines = [
            "# tiny-qa: a word-level Llama that answers questions about a document",
            "",
            f"{n_params:,} parameters, {self.n_layers} layers of width {self.width}, window "
            f"{WINDOW_TOK} tokens, float32, MIT licence. Trained from scratch on the closed "
            "encyclopedia that this repository generates, to answer questions about a document in "
            "its prompt and to say *unknown* where there is no answer; how far it got stands "
            "below. It can do nothing else.",
            "",
            f"Trained with seed {measured['seed']} in {measured['cpu_s']:.0f} s of CPU time: "
            f"{measured['steps']} steps of up to {measured['batch']} documents of up to "
            f"{self.facts[-1]} facts with {self.n_questions} questions each.",
            "",
            f"Exact match on {N_MEASURED} held-out documents each (names that training never used; "
            "the words and forms are those of training), by number of facts:",
            "",
            "| " + " | ".join(map(str, found["by_facts"])) + " |",
            "|---" * len(found["by_facts"]) + "|",
            "| " + " | ".join(f"{v:.2f}" for v in found["by_facts"].values()) + " |",
            "",
            "By kind of question, documents of 8 facts: "
            + ", ".join(f"{kind} {v:.2f}" for kind, v in found["by_kind"].items())
            + f". Recall where several entities are of one type: {found['rivals']:.2f}; without "
            f"the document: {found['without']:.2f}.",
            "",
        ]
        return "\n".join(lines)
