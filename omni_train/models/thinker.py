"""The Thinker as three steps: encode media → merge into the token embeddings → language model.

    MediaTowers(pack) → MediaEmbeds ─┐
                                     ├→ LanguageModel(pack, media) → losses where a label is
    token embeddings ────────────────┘

Composed, not one call, so that a stage can hold the towers in a trained engine and the LLM in a frozen one.

Shapes: T tokens of the pack, K of them with a label, H hidden, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Cache

from omni_train.data.contracts import IGNORE_INDEX, Pack
from omni_train.models.attention import Segments
from omni_train.models.head import Scores, VocabularyHead, token_losses
from omni_train.models.moe import RouterTap, router_sums
from omni_train.models.towers import MediaEmbeds, MediaTowers, visual_order


class LanguageModel(nn.Module):
    """The Thinker's decoder with its head. Parameter names: ``model.*`` and ``lm_head.*``."""

    def __init__(self, decoder: nn.Module, lm_head: nn.Module, token_ids: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = decoder
        self.lm_head = VocabularyHead(lm_head.weight)
        self.config = decoder.config  # AutoEP reads the number of experts here
        self.audio_token_id, self.image_token_id, self.video_token_id = token_ids

    def merge(self, input_ids: Tensor, media: MediaEmbeds | None) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
        """(embeddings [T, H], mask of visual positions [T], DeepStack features in order of those positions).

        Raises ValueError when placeholders and features differ in number (stock ignores this for audio), and for media
        in a stage without towers.
        """
        embeds = self.model.embed_tokens(input_ids)
        is_audio = input_ids == self.audio_token_id
        is_image, is_video = input_ids == self.image_token_id, input_ids == self.video_token_id
        is_visual = is_image | is_video
        if media is None:
            if bool((is_audio | is_visual).any()):
                raise ValueError(
                    "a pack has media, but this stage builds the llm alone; list a component of the towers beside it "
                    "(at a low rate), or leave media out of the mixture"
                )
            return embeds, None, None
        if int(is_audio.sum()) != len(media.audio) or int(is_visual.sum()) != len(media.visual):
            raise ValueError(
                f"a pack has {int(is_audio.sum())} audio and {int(is_visual.sum())} visual placeholders "
                f"for {len(media.audio)} and {len(media.visual)} features"
            )
        order = visual_order(is_image, is_video)
        embeds = embeds.masked_scatter(is_audio[:, None], media.audio.to(embeds.dtype))
        embeds = embeds.masked_scatter(is_visual[:, None], media.visual[order].to(embeds.dtype))
        embeds = embeds + media.anchor.to(embeds.dtype)
        return embeds, is_visual, [level[order] for level in media.deepstack]

    def forward(
        self,
        pack: Pack,
        media: MediaEmbeds | None = None,
        score: Callable[[Tensor, Tensor, Tensor], Scores] = token_losses,
    ) -> dict[str, Tensor]:
        """Losses at the labelled positions and the router's sums.

        Returns what ``score`` makes of (hidden [K, H], head [V, H], labels [K]), which is ``losses`` [K] in nats and
        ``predictions`` unless asked else; ``labels``, ``document`` and ``modality`` [K] of the position;
        ``router_probabilities`` [L, E] (with gradient) and ``router_counts`` [L, E], zero for a pack without samples.
        """
        embeds, is_visual, deepstack = self.merge(pack.input_ids, media)
        lengths = (pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).tolist()
        with RouterTap(self.model.layers) as tap:
            hidden = self.model(
                inputs_embeds=embeds[None],
                position_ids=pack.position_ids[:, None],
                attention_mask=None,
                use_cache=False,
                visual_pos_masks=None if is_visual is None else is_visual[None],
                deepstack_visual_embeds=deepstack,
                varlen=Segments(lengths, embeds.device),
            ).last_hidden_state[0]
        probabilities, counts = router_sums(tap.logits, self.config.num_experts_per_tok)
        is_real = float(len(pack.sample_ids) > 0)
        has_label = pack.shift_labels != IGNORE_INDEX
        scores = self.lm_head(hidden[has_label], pack.shift_labels[has_label], score)
        document = torch.repeat_interleave(
            torch.arange(len(lengths), device=embeds.device), torch.tensor(lengths, device=embeds.device)
        )
        return {
            **scores,
            "labels": pack.shift_labels[has_label],
            "document": document[has_label],
            "modality": pack.doc_modality[document[has_label]],
            "router_probabilities": probabilities * is_real,
            "router_counts": counts * is_real,
        }

    def states_at(self, pack: Pack, media: MediaEmbeds | None, index: Tensor, number: int) -> Tensor:
        """[M, H] at positions ``index`` [M] of a pack after ``number`` layers, as stock's ``hidden_states[number]``.

        That is before a DeepStack level is added to the last of them; after all layers, it is the last norm's output.
        Later layers are not run, nor what stands behind the last position of its document. Raises ValueError for media
        there.
        """
        model = self.model
        input_ids, position_ids, lengths, index = upto(pack, index)
        hidden, is_visual, deepstack = self.merge(input_ids, media)
        hidden = hidden[None]
        segments = Segments(lengths, hidden.device)
        rotary = model.rotary_emb(hidden, position_ids[1:, None])
        for layer in range(number):
            hidden = model.layers[layer](hidden, position_embeddings=rotary, attention_mask=None, varlen=segments)
            if deepstack is not None and is_visual is not None and layer < min(len(deepstack), number - 1):
                hidden = model._deepstack_process(hidden, is_visual[None], deepstack[layer])
        return (model.norm(hidden) if number == len(model.layers) else hidden)[0, index]

    def step(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: Cache,
        is_visual: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
    ) -> Tensor:
        """Next-token logits [B, V] of a padded batch.

        embeds [B, n, H], position_ids [4, B, n], mask bool [B, 1, n, past + n].
        """
        hidden = self.model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=is_visual,
            deepstack_visual_embeds=deepstack,
        ).last_hidden_state
        return self.lm_head(hidden[:, -1])


def upto(pack: Pack, index: Tensor) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """What ends, in each document of a pack, at the last of positions ``index`` [M] in it; others are left out.

    Returns its ``input_ids`` [t], its ``position_ids`` [4, t], the lengths of its documents and ``index`` in it. The
    first token stays where there is no position: ranks that share experts run alike.
    """
    lengths, offset = pack.cu_seqlens.diff().long(), pack.position_ids[0]
    document = torch.searchsorted(pack.cu_seqlens.long(), index, right=True) - 1
    kept = torch.zeros_like(lengths).scatter_reduce(0, document, offset[index] + 1, "amax")
    kept[0] += len(index) == 0
    is_kept = offset < kept.repeat_interleave(lengths)
    own_index = (is_kept.cumsum(0) - 1)[index]
    return pack.input_ids[is_kept], pack.position_ids[:, is_kept], kept[kept > 0].tolist(), own_index


class Thinker(nn.Module):
    """Towers and language model in one module, for stages that train them together."""

    def __init__(self, towers: MediaTowers, llm: LanguageModel) -> None:
        super().__init__()
        self.towers = towers
        self.llm = llm
        self.config = llm.config

    def forward(
        self, pack: Pack, score: Callable[[Tensor, Tensor, Tensor], Scores] = token_losses
    ) -> dict[str, Tensor]:
        """See LanguageModel.forward."""
        return self.llm(pack, self.towers(pack), score)


def compose(thinker: nn.Module) -> Thinker:
    """Our modules around the parameters of a transformers Thinker (shared, not copied)."""
    config = thinker.config
    towers = MediaTowers(thinker.model.audio_tower, thinker.model.visual)
    ids = (config.audio_token_id, config.image_token_id, config.video_token_id)
    return Thinker(towers, LanguageModel(thinker.model.language_model, thinker.lm_head, ids))
