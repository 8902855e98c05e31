"""Stock's whole model that answers in speech, beside our modules with the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from stock import MICRO, encoder_of, perturb, sample, stock_inputs
from transformers import Qwen3OmniMoeForConditionalGeneration

from omni_train.data.contracts import Document
from omni_train.data.encode import collate
from omni_train.data.talker_sequence import SpeechFormat, SpeechTokens, system_tokens, talker_sequence
from omni_train.data.tokenizer import TokenIds, load_tokenizer
from omni_train.models.build import build_talker, build_thinker, omni_config, talker_config, thinker_config
from omni_train.models.talker import Talker, states_for_talker
from omni_train.models.thinker import compose

KINDS = ("text", "audio", "image", "image_audio", "video_audio", "two_pictures")
NUM_TEXT, NUM_FRAMES = 6, 11


def model_of(accept_hidden_layer: int):
    """MICRO with four layers, of whose states the Talker reads those after the third or after all."""
    text = dataclasses.replace(MICRO.text, num_hidden_layers=4)
    return dataclasses.replace(
        MICRO, text=text, talker=dataclasses.replace(MICRO.talker, accept_hidden_layer=accept_hidden_layer)
    )


@dataclasses.dataclass
class Models:
    """Stock's whole model and our modules with the same weights."""

    stock: torch.nn.Module
    thinker: torch.nn.Module
    talker: Talker
    accept_hidden_layer: int
    tokenizer: str


def build_models(accept_hidden_layer: int, folder: str) -> Models:
    model, tokenizer = model_of(accept_hidden_layer), load_tokenizer(folder)
    thinker = build_thinker(thinker_config(model, tokenizer), seed=0).eval()
    talker = build_talker(talker_config(model, tokenizer), seed=1, embedding_std=0.5).eval()
    perturb(thinker)
    perturb(talker, seed=1)
    stock = Qwen3OmniMoeForConditionalGeneration(omni_config(model, tokenizer)).eval()
    stock.thinker.load_state_dict(thinker.state_dict())
    stock.talker.load_state_dict(talker.state_dict())
    return Models(stock, compose(thinker), Talker(talker), accept_hidden_layer, folder)


@torch.no_grad()
def stock_answer(models: Models, kind: str, media, **options):
    """(text ids, codes [G, T], logits of first codes [T + 1, V], logits of residual codes [T, G-1, C]) of an answer.

    ``options`` go to stock's ``generate``. The last logits of first codes are those after the last frame.
    NOTE: stock tells its Thinker alone that a video's sound is heard, unless a call tells its Talker too.
    """
    stock, first, residual, codes = models.stock, [], [], []
    handles = [stock.talker.codec_head.register_forward_hook(lambda m, i, out: first.append(out[0, -1]))]
    handles += [
        head.register_forward_hook(lambda m, i, out: residual.append(out[0, -1]))
        for head in stock.talker.code_predictor.lm_head
    ]
    stock.code2wav.chunked_decode = lambda found, **_: codes.append(found[0]) or torch.zeros(1, 1, 8)
    inputs = stock_inputs(kind, media, media, answer="")
    torch.manual_seed(0)
    sequences, _ = stock.generate(
        **{name: value for name, value in inputs.items() if name != "token_type_ids"},
        speaker="aiden",
        thinker_max_new_tokens=NUM_TEXT + 1,
        thinker_do_sample=False,
        thinker_eos_token_id=None,
        thinker_pad_token_id=0,
        thinker_suppress_tokens=list(range(256, MICRO.text.vocab_size)),  # letters only
        talker_max_new_tokens=NUM_FRAMES + 1,
        talker_min_new_tokens=NUM_FRAMES + 1,
        talker_pad_token_id=0,
        talker_repetition_penalty=options.pop("talker_repetition_penalty", 1.0),
        talker_use_audio_in_video=bool(inputs.get("use_audio_in_video")),
        **options,
    )
    for handle in handles:
        handle.remove()
    text = sequences[0, inputs["input_ids"].shape[1] : -1].numpy()
    groups = len(codes[0])
    return text, codes[0].numpy(), torch.stack(first), torch.stack(residual).view(-1, groups - 1, residual[0].shape[-1])


def answered(prompt: Document, text: np.ndarray, ids: TokenIds) -> Document:
    """The prompt continued by a reply of these tokens."""
    reply = np.array([*text, ids.im_end])
    positions = np.tile(np.arange(len(reply)) + prompt.position_ids.max() + 1, (3, 1))
    return dataclasses.replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, reply]),
        labels=np.full(len(prompt.input_ids) + len(reply), -100),
        position_ids=np.concatenate([prompt.position_ids, positions], axis=1),
    )


def spoken(kind: str, media, text: np.ndarray, codes: np.ndarray, system: str = "") -> Document:
    """The document of an answer in text and codes, with the tokenizer in the media's folder."""
    encoder = encoder_of(str(media))
    tokenizer = encoder.tokenizer
    document = answered(encoder.prompt_and_answer(sample(kind, media))[0], text, encoder.ids)
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(tokenizer))
    prefix = system_tokens(system, tokenizer)
    document.speeches = [talker_sequence(document, prefix, codes, "aiden", format, encoder.geometry)]
    return document


@torch.no_grad()
def ours(models: Models, documents: list[Document]) -> dict[str, torch.Tensor]:
    pack = collate(documents, patch_dim=encoder_of().geometry.patch_dim)
    media_embeds = models.thinker.towers(pack)
    states = states_for_talker(models.thinker.llm, pack, media_embeds, models.accept_hidden_layer)
    return models.talker(pack.speech, states)
