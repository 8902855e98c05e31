"""The Talker with its code predictor (MTP), teacher-forced on packed sequences exactly as generation sees them.

    Thinker (frozen) ──states_for_talker──▶ ThinkerStates ─┐
                                                           ├─▶ Talker(speech, states) → losses of all codes of a frame
    codes of the frames before ───────────────────────────┘

A sequence (omni_train/data/talker_sequence.py) is the user's turns, nine positions that open the reply, and one
position a frame. Each position is the sum of a text side, projected from the Thinker, and a codec side, embedded here.

Shapes: S positions of the pack, M of them media, N frames, G codes a frame, H hidden, V codes, L layers, E experts,
K labelled positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache

from omni_train.data.contracts import IGNORE_INDEX, NO_CODE, Pack, SpeechPack
from omni_train.models.attention import Segments
from omni_train.models.head import token_losses
from omni_train.models.moe import RouterTap, router_sums
from omni_train.models.thinker import LanguageModel
from omni_train.models.towers import MediaEmbeds


@dataclass
class ThinkerStates:
    """What the Talker reads of the Thinker: ``text`` [S, H'] token embeddings of its text side (what stands at media
    positions is not used), ``media`` [M, H'] hidden states of the media in the user's turns; H' the Thinker's width."""

    text: Tensor
    media: Tensor


@torch.no_grad()
def states_for_talker(llm: LanguageModel, pack: Pack, media: MediaEmbeds, accept_hidden_layer: int) -> ThinkerStates:
    """The Thinker's states for the speech of a pack, without gradient. It runs each document up to its last medium."""
    speech = pack.speech
    assert speech is not None
    states = llm.states_at(pack, media, speech.media_index, accept_hidden_layer)
    return ThinkerStates(llm.model.embed_tokens(speech.text_ids), states)


SCORES = ("losses", "predictions")


class Talker(nn.Module):
    """A Qwen3OmniMoeTalkerForConditionalGeneration (``talker``) with a forward to train on."""

    def __init__(self, talker: nn.Module) -> None:
        super().__init__()
        self.talker = talker
        self.config = talker.config.text_config  # AutoEP reads the number of experts here
        self.media_token_ids = tuple(getattr(talker.config, f"{kind}_token_id") for kind in ("audio", "image", "video"))

    def embed_context(self, text_ids: Tensor, codec_ids: Tensor, states: ThinkerStates) -> Tensor:
        """Both sides of positions [S, H], of frames without their residual codes.

        Raises ValueError when placeholders and states of media differ in number.
        """
        talker = self.talker
        is_media = torch.isin(text_ids, torch.tensor(self.media_token_ids, device=text_ids.device))
        if int(is_media.sum()) != len(states.media):
            raise ValueError(f"a pack has {int(is_media.sum())} media positions for {len(states.media)} states")
        text = talker.text_projection(states.text)
        # NOTE: rows of no medium too: every rank's graph must reach the projection.
        text = text.masked_scatter(is_media[:, None], talker.hidden_projection(states.media).to(text.dtype))
        has_code = codec_ids != NO_CODE
        return text + talker.model.codec_embedding(codec_ids.clamp(min=0)) * has_code[:, None]

    def embed_frame(self, codes: Tensor, text: Tensor) -> Tensor:
        """Frames [N, H] of codes [G, N] beside token embeddings [N, H'] of the Thinker."""
        first = self.talker.model.codec_embedding(codes[0])
        return self.talker.text_projection(text) + first + self.residual_embeddings(codes[1:])

    def residual_embeddings(self, codes: Tensor) -> Tensor:
        """Sum over the residual codes [G-1, N] of a frame's embeddings, [N, H]."""
        tables = self.talker.code_predictor.model.codec_embedding
        return torch.stack([table(row) for table, row in zip(tables, codes, strict=True)]).sum(0)

    def forward(self, speech: SpeechPack, states: ThinkerStates) -> dict[str, Tensor]:
        """Losses of the codes and the router's sums.

        Returns ``losses`` [K] in nats of first codes and ends, with ``predictions``, ``labels`` and ``sequence`` [K];
        ``residual_losses`` [N, G-1] with ``residual_predictions`` and ``frame_sequence`` [N], the sequence of each
        frame; ``router_probabilities`` [L, E] (with gradient) and ``router_counts`` [L, E].
        """
        embeds = self.embed_context(speech.text_ids, speech.codec_ids, states)
        embeds = embeds.index_add(0, speech.frame_index, self.residual_embeddings(speech.input_codes[1:]))
        lengths = speech.cu_seqlens.diff().tolist()
        with RouterTap(self.talker.model.layers) as tap:
            hidden = self.talker.model(
                inputs_embeds=embeds[None],
                position_ids=speech.position_ids[:, None],
                attention_mask=None,
                use_cache=False,
                varlen=Segments(lengths, embeds.device),
            ).last_hidden_state[0]
        probabilities, counts = router_sums(tap.logits, self.config.num_experts_per_tok)
        has_label = speech.shift_labels != IGNORE_INDEX
        labels = speech.shift_labels[has_label]
        scores = token_losses(hidden[has_label], self.talker.codec_head.weight, labels)
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=embeds.device), torch.tensor(lengths, device=embeds.device)
        )
        residual_losses, residual_predictions = self.predict_residuals(hidden[speech.frame_index - 1], speech.codes)
        return {
            **scores,
            "labels": labels,
            "sequence": sequence[has_label],
            "residual_losses": residual_losses,
            "residual_predictions": residual_predictions,
            "frame_sequence": sequence[speech.frame_index],
            "router_probabilities": probabilities,
            "router_counts": counts,
        }

    def predict_residuals(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(losses in nats, predictions), each [N, G-1], of the residual codes, all frames and codes in one pass.

        ``hidden`` [N, H]: the Talker's output where a frame's first code is predicted; ``codes`` [G, N]. A frame is a
        sequence [h, emb(c0) … emb(c_{G-2})] of its own; its output g + 1 goes through head g, for code g + 1.
        """
        predictor = self.talker.code_predictor
        embeddings = [self.talker.model.codec_embedding(codes[0])]
        embeddings += [table(row) for table, row in zip(predictor.model.codec_embedding, codes[1:-1], strict=False)]
        inputs = torch.stack([hidden, *embeddings], dim=1)
        outputs = predictor.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        found = [token_losses(outputs[:, g + 1], head.weight, codes[g + 1]) for g, head in enumerate(predictor.lm_head)]
        losses, predictions = (torch.stack([scores[name] for scores in found], dim=1) for name in SCORES)
        return losses, predictions

    def step(self, embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """The output [B, H] at the last position of a batch, which predicts the next frame's first code.

        embeds [B, n, H], position_ids [4, B, n], mask bool [B, 1, n, past + n].
        """
        return self.talker.model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
