import io

import numpy as np
import pytest
import soundfile

from omni_train.data.audio import audio_facts, decode_audio, log_mel
from omni_train.data.media_tokens import audio_num_frames

RNG = np.random.default_rng(0)


def file_of(wave, rate, kind="WAV", subtype=None):
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, subtype=subtype)
    return out.getvalue()


def noise(num_samples, channels=1):
    return (RNG.standard_normal((num_samples, channels)) * 0.1).astype(np.float32)


def test_16_khz_float_wave_comes_back_exactly():
    wave = noise(3_333)[:, 0]
    np.testing.assert_array_equal(decode_audio(file_of(wave, 16_000, subtype="FLOAT")), wave)


def test_channels_are_averaged():
    wave = noise(2_000, channels=2)
    np.testing.assert_allclose(decode_audio(file_of(wave, 16_000, subtype="FLOAT")), wave.mean(axis=1), atol=1e-7)


def test_resampling_keeps_a_tone_and_removes_what_16_khz_cannot_hold():
    seconds = np.arange(48_000) / 48_000
    tone, high = np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 12_000 * seconds)
    wave = decode_audio(file_of(0.5 * tone + 0.4 * high, 48_000, subtype="FLOAT"))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert wave.dtype == np.float32 and len(wave) == 16_000
    assert np.abs(wave - expected)[500:-500].max() < 1e-3


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_header_counts_what_decoding_gives(kind, rate):
    for num_samples in (1_000, rate // 3, rate + 77):
        data = file_of(noise(num_samples)[:, 0], rate, kind)
        facts = audio_facts("a", data)
        assert (facts.num_samples, facts.sample_rate_hz, facts.kind) == (num_samples, rate, "audio")
        assert log_mel(decode_audio(data)).shape == (128, audio_num_frames(num_samples, rate))


def test_mel_of_a_tone_peaks_in_its_band_and_silence_is_flat():
    tone = np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000).astype(np.float32)
    mel = log_mel(tone)
    # slaney scale: 1 kHz is mel 15 of 45.25 (8 kHz); 128 filters between: 15 / 45.25 * 129 - 1 = 41.8
    assert set(mel[:, 5:95].argmax(axis=0)) <= {41, 42}
    np.testing.assert_allclose(log_mel(np.zeros(1_600, np.float32)), -1.5)  # (log10(1e-10) + 4) / 4


def test_mel_spans_eight_decades_below_its_maximum():
    mel = log_mel(np.concatenate([np.zeros(8_000, np.float32), noise(8_000)[:, 0]]))
    assert mel.max() - mel.min() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "audio is empty"),
        (b"no sound here", "cannot read audio of 13 bytes"),
        (file_of(np.zeros(200, np.float32), 16_000), "audio of 200 samples at 16,000 Hz is too short"),
        (file_of(np.zeros(0, np.float32), 16_000), "audio of 0 samples"),
    ],
)
def test_what_is_no_audio_is_refused_already_from_its_header(data, message):
    with pytest.raises(ValueError, match=message):
        audio_facts("a", data)
    with pytest.raises(ValueError, match=message):
        decode_audio(data)


def test_nan_and_infinity_are_refused():
    for value in (np.nan, np.inf):
        wave = noise(1_000)[:, 0]
        wave[500] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            decode_audio(file_of(wave, 16_000, subtype="FLOAT"))
        with pytest.raises(ValueError, match="NaN or infinite"):
            log_mel(wave)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_file_cut_short_is_refused_or_counted_alike(kind):
    data = file_of(noise(16_000)[:, 0], 16_000, kind)
    cut = data[: len(data) // 2]
    facts = None
    try:
        facts = audio_facts("a", cut)
        wave = decode_audio(cut)
    except ValueError as error:
        assert "cut short" in str(error) or "cannot" in str(error)
    else:
        assert len(wave) == facts.num_samples


def test_silence_and_the_shortest_clip_pass():
    assert decode_audio(file_of(np.zeros(1_600, np.float32), 16_000)).shape == (1_600,)
    assert log_mel(np.zeros(201, np.float32)).shape == (128, 1)
