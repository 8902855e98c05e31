"""Media towers: mel features and picture patches → embeddings of the LLM's width.

The modules are transformers' own; audio's front end is composed here, because stock pads each clip to its batch mates
(a clip under one second then changes with them) and attends in fixed windows.

Shapes: C chunks, A audio tokens, V visual tokens, P patches, E encoder width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni_train.data.contracts import Pack
from omni_train.models.attention import Segments

CHUNK_FRAMES = 100  # one second of mel frames, convolved on its own
CHUNK_TOKENS = 13  # what three stride-2 convolutions leave of it
RECOMPUTED_CHUNKS = 256  # in one piece


def halve(length):
    """Length (int or tensor) after a convolution of kernel 3, stride 2, padding 1."""
    return (length - 1) // 2 + 1


@dataclass
class MediaEmbeds:
    """What the towers give the LLM: audio [A, H]; visual [V, H] and one [V, H] a DeepStack level, pictures first.

    ``anchor`` is a zero that depends on every tower parameter, so that every rank's graph reaches all of them (without
    gradients on nothing).
    NOTE: no slots here: ZeRO-3's hooks look for tensors in vars(output).
    """

    audio: Tensor
    visual: Tensor
    deepstack: list[Tensor]
    anchor: Tensor


def chunks_of(frames: int, is_continued: bool = False) -> list[tuple[int, int]]:
    """(frames, frames it is padded to) of each chunk of a clip, or of the rest of a clip that has had whole chunks.

    As in stock, the last chunk of a clip is padded to 100 frames if the clip has a whole one; a shorter clip is not.
    """
    full, rest = divmod(frames, CHUNK_FRAMES)
    padded = CHUNK_FRAMES if full or is_continued else rest
    return [(CHUNK_FRAMES, CHUNK_FRAMES)] * full + ([(rest, padded)] if rest else [])


def embed_chunks(tower: nn.Module, mel: Tensor, chunks: list[tuple[int, int]]) -> Tensor:
    """Convolution and position embedding of consecutive chunks of mel [128, F] → tokens [A, E].

    Where the tower's layers are recomputed this is too, in blocks: at full size a chunk is some 10 MB until its
    backward. NOTE: in one block under ZeRO 3, where every call gathers weights and ranks must make equally many.
    """
    if not (tower.training and getattr(tower, "gradient_checkpointing", False)):
        return _embed_chunks(tower, mel, chunks)
    size = len(chunks) if hasattr(tower.conv2d1.weight, "ds_id") else RECOMPUTED_CHUNKS
    blocks = [chunks[start : start + size] for start in range(0, len(chunks), size)]
    parts = mel.split([sum(frames for frames, _ in block) for block in blocks], dim=1)
    embedded = [
        checkpoint(_embed_chunks, tower, part, block, use_reentrant=False)
        for part, block in zip(parts, blocks, strict=True)
    ]
    return torch.cat(embedded)


def _embed_chunks(tower: nn.Module, mel: Tensor, chunks: list[tuple[int, int]]) -> Tensor:
    """``embed_chunks`` of one block.

    Activations beyond the length that a chunk is padded to are zeroed after each convolution, so a chunk is the same
    whatever stands beside it.
    """
    frames_C = torch.tensor([frames for frames, _ in chunks], device=mel.device)
    padded_C = torch.tensor([padded for _, padded in chunks], device=mel.device)
    longest = max(padded for _, padded in chunks)
    is_ragged = min(padded for _, padded in chunks) < longest
    pieces = nn.utils.rnn.pad_sequence(list(mel.T.split([frames for frames, _ in chunks])), batch_first=True)
    hidden = F.pad(pieces.transpose(1, 2), (0, longest - pieces.shape[1]))[:, None].to(tower.conv2d1.weight.dtype)
    for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
        hidden = F.gelu(convolution(hidden))
        padded_C = halve(padded_C)
        if is_ragged:
            is_inside = torch.arange(hidden.shape[-1], device=mel.device) < padded_C[:, None]
            hidden = hidden * is_inside[:, None, None, :]
    num_chunks, channels, bins, steps = hidden.shape
    hidden = tower.conv_out(hidden.permute(0, 3, 1, 2).reshape(num_chunks, steps, channels * bins))
    hidden = hidden + tower.positional_embedding.positional_embedding[:steps].to(hidden.dtype)
    return hidden[torch.arange(steps, device=mel.device) < halve(halve(halve(frames_C)))[:, None]]


def attend(tower: nn.Module, hidden: Tensor, windows: list[int]) -> Tensor:
    """The encoder's layers on tokens [A, E] that attend within consecutive windows of these lengths."""
    segments = Segments(windows, hidden.device)
    for layer in tower.layers:
        hidden = layer(hidden, segments.boundaries, max_seqlen=segments.longest, varlen=segments)[0]
    return tower.ln_post(hidden)


def encode_audio(tower: nn.Module, mel: Tensor, mel_lengths: Tensor, window_sec: Tensor) -> Tensor:
    """AuT encoder output [A, E] of clips whose mel [128, F] frames are concatenated.

    A clip comes out as from the stock encoder on it alone, whatever stands beside it. Attention runs in windows of
    ``window_sec`` [clips] whole seconds.
    """
    clips = [chunks_of(frames) for frames in mel_lengths.tolist()]
    windows = []
    for clip, seconds in zip(clips, window_sec.tolist(), strict=True):
        tokens = sum(halve(halve(halve(frames))) for frames, _ in clip)
        full, rest = divmod(tokens, CHUNK_TOKENS * seconds)
        windows += [CHUNK_TOKENS * seconds] * full + ([rest] if rest else [])
    return attend(tower, embed_chunks(tower, mel, [chunk for clip in clips for chunk in clip]), windows)


def stream_audio(tower: nn.Module, mel: Iterable[Tensor], window_sec: int) -> Iterator[Tensor]:
    """The encoder output of one clip, window by window [≤ 13 · window_sec, E], as pieces [128, any] of its mel arrive.

    Joined, it is ``encode_audio`` of the whole clip: a window depends on nothing after it and can be prefilled at once.
    """
    size, waiting, is_continued = CHUNK_FRAMES * window_sec, [], False

    def encode(frames: Tensor) -> Tensor:
        hidden = embed_chunks(tower, frames, chunks_of(frames.shape[1], is_continued))
        return attend(tower, hidden, [len(hidden)])

    for piece in mel:
        waiting.append(piece)
        while sum(part.shape[1] for part in waiting) >= size:
            frames = torch.cat(waiting, dim=1)
            yield encode(frames[:, :size])
            waiting, is_continued = [frames[:, size:]], True
    rest = torch.cat(waiting, dim=1) if waiting else None
    if rest is not None and rest.shape[1]:
        yield encode(rest)


def adapt_audio(tower: nn.Module, hidden: Tensor) -> Tensor:
    """The audio adapter: encoder output [A, E] → [A, H]."""
    return tower.proj2(tower.act(tower.proj1(hidden)))


def encode_vision(visual: nn.Module, pixel_values: Tensor, grid_thw: Tensor):
    """Vision encoder on patches [P, 3·t·p·p] of pictures [n, 3]: each frame attends within itself.

    Returns its output: last_hidden_state [P, E], pooler_output [V, H] and deepstack_features, [V, H] a level.
    """
    frames = grid_thw[:, 0].tolist()
    sizes = (grid_thw[:, 1] * grid_thw[:, 2]).tolist()
    lengths = [size for size, count in zip(sizes, frames, strict=True) for _ in range(count)]
    return visual(pixel_values, grid_thw=grid_thw, varlen=Segments(lengths, pixel_values.device))


def visual_inputs(pack: Pack) -> tuple[Tensor, Tensor]:
    """(patches [P, patch_dim], grids [n, 3]) of everything to see in a pack: pictures first, then videos."""
    pixels = torch.cat([pack.pixel_values, pack.pixel_values_videos])
    return pixels, torch.cat([pack.image_grid_thw, pack.video_grid_thw])


def visual_order(is_image: Tensor, is_video: Tensor) -> Tensor:
    """[V]: which of ``visual_inputs``' tokens stands at each visual position of a pack, from masks [T]."""
    rank = torch.where(is_image, is_image.cumsum(0) - 1, is_image.sum() + is_video.cumsum(0) - 1)
    return rank[is_image | is_video]


def patch_width(visual: nn.Module) -> int:
    """Numbers in one patch. NOTE: not from the weight: touching a ZeRO-3 parameter gathers it, on this rank alone."""
    patches = visual.patch_embed
    return patches.in_channels * patches.temporal_patch_size * patches.patch_size**2


class MediaTowers(nn.Module):
    """Audio tower and vision encoder with their adapters.

    Both run in every forward that ranks must do alike, on a minimal dummy if need be: one with gradients, or with
    parameters that ZeRO-3 gathers.
    """

    def __init__(self, audio_tower: nn.Module, visual: nn.Module) -> None:
        super().__init__()
        self.audio_tower = audio_tower
        self.visual = visual

    def forward(self, pack: Pack) -> MediaEmbeds:
        # ZeRO-3 numbers the modules that it gathers for. NOTE: not a parameter's mark: touching one gathers it.
        is_alike = torch.is_grad_enabled() or hasattr(self, "ds_id")
        has_audio = len(pack.mel_lengths) > 0
        has_vision = len(pack.image_grid_thw) + len(pack.video_grid_thw) > 0
        nothing = torch.zeros(0, self.visual.config.out_hidden_size, device=pack.input_ids.device)
        nothings = [nothing] * len(self.visual.deepstack_visual_indexes)
        audio = self._hear(pack) if has_audio or is_alike else nothing
        visual, deepstack = self._see(pack) if has_vision or is_alike else (nothing, nothings)
        anchor = 0.0 * (audio.sum() + visual.sum() + sum(level.sum() for level in deepstack))
        if not has_audio:
            audio = nothing
        if not has_vision:
            visual, deepstack = nothing, nothings
        return MediaEmbeds(audio, visual, deepstack, anchor)

    def _hear(self, pack: Pack) -> Tensor:
        """[A, H] of the clips of a pack, or of a dummy."""
        mel, lengths, windows = pack.mel, pack.mel_lengths, pack.audio_window_sec
        if len(lengths) == 0:
            mel = torch.zeros(self.audio_tower.num_mel_bins, 8, device=pack.input_ids.device)
            lengths, windows = torch.tensor([8]), torch.tensor([1])
        return adapt_audio(self.audio_tower, encode_audio(self.audio_tower, mel, lengths, windows))

    def _see(self, pack: Pack) -> tuple[Tensor, list[Tensor]]:
        """([V, H], one [V, H] a DeepStack level) of the pictures and videos of a pack, or of a dummy."""
        pixels, grids = visual_inputs(pack)
        if len(grids) == 0:
            merge = self.visual.spatial_merge_size
            grids = torch.tensor([[1, merge, merge]], device=pixels.device)
            pixels = torch.zeros(merge * merge, patch_width(self.visual), device=pixels.device)
        vision = encode_vision(self.visual, pixels, grids)
        return vision.pooler_output, list(vision.deepstack_features)
