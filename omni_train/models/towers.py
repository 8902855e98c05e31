"""Media towers: mel features and picture patches → embeddings of the LLM's width.

The modules are transformers' own; audio's front end is composed here, because stock pads each clip to its batch mates (a clip
under one second then changes with them) and attends in fixed windows.

Shapes: A audio tokens, V visual tokens, P patches, E encoder width, H LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_train.data.contracts import Pack
from omni_train.models.attention import Segments

CHUNK_FRAMES = 100  # one second of mel frames, convolved on its own
CHUNK_TOKENS = 13  # what three stride-2 convolutions leave of it


def halve(length: Tensor) -> Tensor:
    """Length after a convolution of kernel 3, stride 2, padding 1."""
    return (length - 1) // 2 + 1


@dataclass
class MediaEmbeds:
    """What the towers give the LLM: audio [A, H]; visual [V, H] and one [V, H] a DeepStack level, pictures before videos.

    ``anchor`` is a zero that depends on every tower parameter, so that every rank's graph reaches all of them.
    NOTE: no slots here: ZeRO-3's hooks look for tensors in vars(output).
    """

    audio: Tensor
    visual: Tensor
    deepstack: list[Tensor]
    anchor: Tensor


def encode_audio(tower: nn.Module, mel: Tensor, mel_lengths: Tensor, window_sec: Tensor) -> Tensor:
    """AuT encoder output [A, E] of clips whose mel [128, F] frames are concatenated.

    Each clip is cut into chunks of 100 frames. A clip of at least one chunk pads its last chunk to 100 frames as stock does; a
    shorter one keeps its own padding (activations beyond its end are zeroed after each convolution), so it equals the clip
    encoded alone, whatever stands beside it. Attention runs in windows of ``window_sec`` [clips] seconds.
    """
    chunk_frames, chunk_keep, token_counts = [], [], []
    for frames in mel_lengths.tolist():
        full, rest = divmod(frames, CHUNK_FRAMES)
        chunk_frames += [CHUNK_FRAMES] * full + ([rest] if rest else [])
        chunk_keep += [CHUNK_FRAMES if full else rest] * (full + bool(rest))
        token_counts.append(CHUNK_TOKENS * full + (int(halve(halve(halve(torch.tensor(rest))))) if rest else 0))
    frames_C = torch.tensor(chunk_frames, device=mel.device)
    keep_C = torch.tensor(chunk_keep, device=mel.device)
    longest = max(chunk_keep)
    padded = nn.utils.rnn.pad_sequence(list(mel.T.split(chunk_frames)), batch_first=True).transpose(1, 2)
    hidden = F.pad(padded, (0, longest - padded.shape[-1]))[:, None].to(tower.conv2d1.weight.dtype)
    is_ragged = min(chunk_keep) < longest
    for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
        hidden = F.gelu(convolution(hidden))
        keep_C = halve(keep_C)
        if is_ragged:
            hidden = hidden * (torch.arange(hidden.shape[-1], device=mel.device) < keep_C[:, None])[:, None, None, :]
    chunks, channels, bins, steps = hidden.shape
    hidden = tower.conv_out(hidden.permute(0, 3, 1, 2).reshape(chunks, steps, channels * bins))
    hidden = hidden + tower.positional_embedding.positional_embedding[:steps].to(hidden.dtype)
    valid = torch.arange(steps, device=mel.device) < halve(halve(halve(frames_C)))[:, None]
    hidden = hidden[valid]

    lengths = []
    for tokens, seconds in zip(token_counts, window_sec.tolist(), strict=True):
        full, rest = divmod(tokens, CHUNK_TOKENS * seconds)
        lengths += [CHUNK_TOKENS * seconds] * full + ([rest] if rest else [])
    segments = Segments.of(lengths, mel.device)
    boundaries = F.pad(torch.tensor(lengths, device=mel.device).cumsum(0), (1, 0)).to(torch.int32)
    for layer in tower.layers:
        hidden = layer(hidden, boundaries, max_seqlen=max(lengths), varlen=segments)[0]
    return tower.ln_post(hidden)


def adapt_audio(tower: nn.Module, hidden: Tensor) -> Tensor:
    """The audio adapter: encoder output [A, E] → [A, H]."""
    return tower.proj2(tower.act(tower.proj1(hidden)))


def encode_vision(visual: nn.Module, pixel_values: Tensor, grid_thw: Tensor):
    """Vision encoder on patches [P, 3·t·p·p] of pictures [n, 3] → its output with last_hidden_state [P, E], pooler_output
    [V, H] and deepstack_features, [V, H] a level. Each frame attends within itself."""
    frames = grid_thw[:, 0].tolist()
    sizes = (grid_thw[:, 1] * grid_thw[:, 2]).tolist()
    lengths = [size for size, count in zip(sizes, frames, strict=True) for _ in range(count)]
    return visual(pixel_values, grid_thw=grid_thw, varlen=Segments.of(lengths, pixel_values.device))


class MediaTowers(nn.Module):
    """Audio tower and vision encoder with their adapters. Both run in every forward, on a minimal dummy if need be."""

    def __init__(self, audio_tower: nn.Module, visual: nn.Module) -> None:
        super().__init__()
        self.audio_tower = audio_tower
        self.visual = visual

    def forward(self, pack: Pack) -> MediaEmbeds:
        device = pack.input_ids.device
        has_audio, mel, lengths, windows = len(pack.mel_lengths) > 0, pack.mel, pack.mel_lengths, pack.audio_window_sec
        if not has_audio:
            mel = torch.zeros(self.audio_tower.num_mel_bins, 8, device=device)
            lengths, windows = torch.tensor([8]), torch.tensor([1])
        audio = adapt_audio(self.audio_tower, encode_audio(self.audio_tower, mel, lengths, windows))

        grids = torch.cat([pack.image_grid_thw, pack.video_grid_thw])
        has_vision = len(grids) > 0
        if has_vision:
            pixels = torch.cat([pack.pixel_values, pack.pixel_values_videos])
        else:
            merge = self.visual.spatial_merge_size
            width = self.visual.patch_embed.proj.weight[0].numel()
            grids = torch.tensor([[1, merge, merge]], device=device)
            pixels = torch.zeros(merge * merge, width, device=device)
        vision = encode_vision(self.visual, pixels, grids)
        visual, deepstack = vision.pooler_output, list(vision.deepstack_features)
        anchor = 0.0 * (audio.sum() + visual.sum() + sum(level.sum() for level in deepstack))
        if not has_audio:
            audio = audio[:0]
        if not has_vision:
            visual, deepstack = visual[:0], [level[:0] for level in deepstack]
        return MediaEmbeds(audio, visual, deepstack, anchor)
