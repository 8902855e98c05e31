"""Sequence-to-sequence pretraining of an encoder: AuT (audio → transcript) and the captioner (picture or video →
caption).

    media ─ encoder ─▶ memory [D, S, E] ─┐
    prompt and answer tokens [D, L] ─────┴─ decoder with cross-attention ─▶ losses where a label is

The decoder reads the conversation without its media placeholders, so the question is the task and language prefix. Each
document of a pack is one row: nothing is shared between documents.

Shapes: D documents, L tokens of the longest row, S media tokens of the longest clip, E width, K labelled positions.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_train.data.contracts import IGNORE_INDEX, Pack
from omni_train.models.head import VocabularyHead
from omni_train.models.towers import encode_audio, encode_vision, patch_width, visual_inputs, visual_order


def pad_rows(values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of ``lengths`` cut from values [N, ...] → (padded [D, longest, ...], mask bool [D, longest])."""
    padded = nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)
    mask = torch.arange(padded.shape[1], device=values.device) < torch.tensor(lengths, device=values.device)[:, None]
    return padded, mask


CTC_SLOTS = 2  # CTC outputs an encoder output: one of 80 ms is too long for one letter
CTC_CLASSES = 257  # the bytes, then the blank


class TextDecoder(nn.Module):
    """The library's attention decoder with a vocabulary head; and, with ``has_ctc``, a CTC head that spells the answer
    in bytes from encoder outputs, which training alone uses."""

    def __init__(self, decoder: nn.Module, has_ctc: bool) -> None:
        super().__init__()
        width, vocabulary = decoder.config.hidden_size, decoder.config.vocab_size
        self.decoder = decoder
        self.head = VocabularyHead(nn.Linear(width, vocabulary, bias=False).weight)
        self.ctc_head = nn.Linear(width, CTC_SLOTS * CTC_CLASSES) if has_ctc else None


class EncoderDecoder(nn.Module):
    """An audio or vision encoder (``kind``) with a text decoder that attends to it."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: TextDecoder,
        kind: str,
        media_token_ids: tuple[int, ...],
        spelling: list[bytes] | None = None,
    ) -> None:
        """``media_token_ids``: of audio, or of pictures and videos. ``spelling``: the bytes of each token id, none for
        a control token, for the CTC head."""
        super().__init__()
        self.kind = kind
        self.spelling = spelling
        self.media_token_ids = media_token_ids
        if kind == "audio":
            self.audio_tower, self.audio_decoder = encoder, decoder
        else:
            self.visual, self.vision_decoder = encoder, decoder

    @property
    def text_decoder(self) -> TextDecoder:
        return self.audio_decoder if self.kind == "audio" else self.vision_decoder

    def is_media(self, pack: Pack) -> Tensor:
        """Mask [T] of the media placeholders."""
        return torch.isin(pack.input_ids, torch.tensor(self.media_token_ids, device=pack.input_ids.device))

    def encode(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Encoder output by document: (memory [D, S, E], mask [D, S]). A document without media has an empty row.

        Raises ValueError for a pack with media of the other kind, whose placeholders would be read as text.
        """
        num_pictures = len(pack.image_grid_thw) + len(pack.video_grid_thw)
        if num_pictures if self.kind == "audio" else len(pack.mel_lengths):
            reads = "transcription reads audio" if self.kind == "audio" else "captioning reads pictures and videos"
            names = ", ".join(pack.sample_ids)
            raise ValueError(f"{reads} alone; sample {names}: leave sources with other media out of the mixture")
        counts = self._per_document(pack, self.is_media(pack).long())
        if self.kind == "audio":
            hidden = encode_audio(self.audio_tower, pack.mel, pack.mel_lengths, pack.audio_window_sec)
        else:
            unit = self.visual.spatial_merge_unit
            order = visual_order(*(pack.input_ids == token for token in self.media_token_ids))
            hidden = encode_vision(self.visual, *visual_inputs(pack)).last_hidden_state
            hidden = hidden.unflatten(0, (-1, unit))[order].flatten(0, 1)
            counts = [n * unit for n in counts]
        if sum(counts) != len(hidden):
            raise ValueError(f"a {self.kind} pack has {sum(counts)} media tokens for {len(hidden)} encoder outputs")
        return pad_rows(hidden, counts)

    def text_tokens(self, pack: Pack) -> tuple[Tensor, list[int]]:
        """(token ids of all documents without media placeholders [N], how many each document has)."""
        is_text = ~self.is_media(pack)
        return pack.input_ids[is_text], self._per_document(pack, is_text.long())

    @staticmethod
    def _per_document(pack: Pack, values: Tensor) -> list[int]:
        """Sums of per-token values over each document."""
        return F.pad(values.cumsum(0), (1, 0))[pack.cu_seqlens.long()].diff().tolist()

    def decode(self, ids: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Decoder states [D, L, E] of token ids [D, L], right-padded."""
        return self.text_decoder.decoder(
            input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=memory_mask, use_cache=False
        ).last_hidden_state

    def forward(self, pack: Pack) -> dict[str, Tensor]:
        """``losses`` [K] in nats, ``predictions``, ``labels``, ``document`` and ``modality`` [K] of the position; with
        a CTC head also what ``ctc`` returns. A pack without samples has no label."""
        if not pack.sample_ids:
            pack = self._dummy(pack)
        memory, memory_mask = self.encode(pack)
        text, lengths = self.text_tokens(pack)
        ids, _ = pad_rows(text, lengths)
        labels, is_token = pad_rows(pack.shift_labels[~self.is_media(pack)], lengths)
        has_label = (labels != IGNORE_INDEX) & is_token
        hidden = self.decode(ids, memory, memory_mask)
        scores = self.text_decoder.head(hidden[has_label], labels[has_label])
        rows = torch.arange(len(lengths), device=ids.device)[:, None].expand_as(labels)
        output = {
            **scores,
            "labels": labels[has_label],
            "document": rows[has_label],
            "modality": pack.doc_modality[rows[has_label]],
        }
        if self.text_decoder.ctc_head is not None:
            output |= self.ctc(memory, memory_mask, output["labels"], output["document"])
        return output

    def ctc(self, memory: Tensor, memory_mask: Tensor, labels: Tensor, document: Tensor) -> dict[str, Tensor]:
        """Logits over bytes [D, S · slots, 257] with lengths [D]; targets of all documents [N] with lengths [D]."""
        spelling, head = self.spelling, self.text_decoder.ctc_head
        assert spelling is not None and head is not None
        num_documents, steps, _ = memory.shape
        texts = [b""] * num_documents
        for token, row in zip(labels.tolist(), document.tolist(), strict=True):
            texts[row] += spelling[token]
        logits = head(memory).view(num_documents, steps * CTC_SLOTS, CTC_CLASSES)
        return {
            "ctc_logits": logits,
            "ctc_lengths": memory_mask.sum(-1) * CTC_SLOTS,
            "ctc_targets": torch.tensor(list(b"".join(texts)), dtype=torch.long, device=memory.device),
            "ctc_target_lengths": torch.tensor([len(text) for text in texts], device=memory.device),
        }

    def _dummy(self, pack: Pack) -> Pack:
        """A pack of one document with minimal media and no label, so that every rank's graph holds every parameter."""
        device = pack.input_ids.device
        values = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
        if self.kind == "audio":
            values["mel"] = torch.zeros(self.audio_tower.num_mel_bins, 8, device=device)
            values["mel_lengths"] = torch.tensor([8], device=device)
            values["audio_window_sec"] = torch.tensor([1], device=device)
        else:
            merge = self.visual.spatial_merge_size
            values["image_grid_thw"] = torch.tensor([[1, merge, merge]], device=device)
            patch_dim = patch_width(self.visual)
            values["pixel_values"] = torch.zeros(merge * merge, patch_dim, device=device)
            values["pixel_values_videos"] = torch.zeros(0, patch_dim, device=device)
            values["video_grid_thw"] = torch.zeros(0, 3, dtype=torch.long, device=device)
        ids = torch.tensor([self.media_token_ids[0], 0, 0], device=device)
        values["input_ids"] = ids
        values["shift_labels"] = torch.full_like(ids, IGNORE_INDEX)
        values["cu_seqlens"] = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        values["doc_modality"] = torch.zeros(1, dtype=torch.long, device=device)
        return Pack(**values)
