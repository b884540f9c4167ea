"""Answers of the student's own, for the teacher to judge (Agarwal et al. 2024, generalized knowledge distillation)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hfcompress.config import OnPolicyConfig
from hfcompress.distillation.teachers import OWN_ANSWERS
from hfcompress.training.items import IGNORED, batch_size


class OnPolicy:
    """Replaces the answers of some batches by what the student says to their prompts.

    They are no labels: the task's own loss is left out for such a batch. Which batches, and what is drawn, follows from seed, step, place in the step and process: a run that is resumed draws the
    same. All processes rewrite the same batches.

    Args:
        config: How often and how long.
        student: A causal language model, or one with encoder and decoder.
        seed: Of the run.

    Raises:
        ValueError: The model does not write.
    """

    def __init__(self, config: OnPolicyConfig, student: Any, *, seed: int) -> None:
        if not hasattr(student, "generate") or not student.can_generate():
            raise ValueError(
                f"distill.on_policy is for models that write (causal and sequence-to-sequence); {type(student).__name__} does not: leave it out"
            )
        self.config = config
        self.seed = seed

    def rewrite(
        self, batches: Iterable[Mapping[str, Any]], student: Any, *, step: int, rank: int, device: torch.device
    ) -> Iterator[Mapping[str, Any]]:
        """The batches of one optimizer step, some with answers of the student's own."""
        for place, batch in enumerate(batches):
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + place)
            if torch.rand((), generator=draw).item() >= self.config.share:
                yield batch
                continue
            drawn = int(torch.randint(2**31, (), generator=draw)) + rank
            given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(drawn)
                yield self._answered(given, student)

    def _answered(self, batch: Mapping[str, Any], student: Any) -> dict[str, Any]:
        training = {module: module.training for module in student.modules()}
        student.eval()
        try:
            with torch.no_grad():
                if student.config.is_encoder_decoder:
                    return self._of_encoder_decoder(batch, student)
                return self._of_decoder(batch, student)
        finally:
            for module, mode in training.items():
                module.training = mode

    def _generate(self, student: Any, **inputs: Any) -> torch.Tensor:
        sampling = {"do_sample": False}
        if self.config.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.config.temperature, "top_k": 0}  # type: ignore[dict-item]
        return student.generate(
            **inputs, **sampling, max_new_tokens=self.config.max_new_tokens, pad_token_id=_pad(student), use_cache=True
        )

    def _of_encoder_decoder(self, batch: Mapping[str, Any], student: Any) -> dict[str, Any]:
        kept = {k: v for k, v in batch.items() if k != "labels" and not k.startswith("decoder_")}
        written = self._generate(student, **{k: v for k, v in kept.items() if isinstance(v, torch.Tensor)})[:, 1:]
        labels = written.masked_fill(~_until_end(written, _ends(student)), IGNORED)
        return {**kept, "labels": labels, OWN_ANSWERS: True}

    def _of_decoder(self, batch: Mapping[str, Any], student: Any) -> dict[str, Any]:
        prompts = _prompts(batch)
        pad, longest = _pad(student), max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad, device=prompts[0].device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # models write after the last place, so the padding stands before
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        written = self._generate(student, input_ids=ids, attention_mask=mask)[:, longest:]
        real = _until_end(written, _ends(student))
        answers = [row[keep] for row, keep in zip(written, real, strict=True)]
        return {**_packed(prompts, answers, pad=pad), OWN_ANSWERS: True}


def _prompts(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tokens of each example before its first label."""
    if batch.get("labels") is None or batch.get("input_ids") is None:
        raise ValueError("distill.on_policy needs input_ids, and labels that are -100 on the prompt")
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    prompts = []
    for row in range(batch_size(batch)):
        answered = (labels[row] != IGNORED).nonzero()
        end = int(answered[0]) if len(answered) else labels.shape[1]
        prompt = ids[row, :end][mask[row, :end].bool()]
        if not len(prompt):
            raise ValueError(
                "distill.on_policy needs prompts to answer, and an example has none: labels must be -100 on the prompt"
            )
        prompts.append(prompt)
    return prompts


def _packed(prompts: list[torch.Tensor], answers: list[torch.Tensor], *, pad: int) -> dict[str, torch.Tensor]:
    """Prompts with their answers as a batch, padded at the end."""
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), length), pad, device=prompts[0].device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.cat([prompt, answer])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _until_end(written: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """True up to and with the first token that ends a text.

    Example:
        >>> _until_end(torch.tensor([[5, 2, 0], [5, 6, 7]]), [2]).tolist()
        [[True, True, False], [True, True, True]]
    """
    ended = torch.zeros_like(written)
    for end in ends:
        ended += written == end
    return ended.cumsum(-1) - ended == 0


def _ends(student: Any) -> list[int]:
    ends = student.generation_config.eos_token_id
    ends = student.config.eos_token_id if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, list) else [int(ends)]


def _pad(student: nn.Module) -> int:
    config: Any = student.config
    for value in (student.generation_config.pad_token_id, config.pad_token_id, *_ends(student)):  # type: ignore[union-attr]
        if value is not None:
            return int(value)
    return 0
