"""Make the labelled data of `benchmarks/optimizer.py` that need a font or a voice: run where Pillow is.

Labelled by construction, not field data. Usage: `python optimizer_data.py ESPEAK_FOLDER LEE.cor ALPHABET OUT`: writes
`speech.npz` (clips at 16 kHz and a flag per 512 values) and `lines.npz` (images of text lines and the indices of their
characters).
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLIPS = 60
LINES = 330
CHUNK = 512
RATE = 16_000
VOICES = ("en-us", "en-gb", "de", "fr-fr", "es", "it")
SAID = (
    "the quick brown fox jumps over the lazy dog",
    "please turn the light on in the kitchen",
    "eleven benevolent elephants walk along the river",
    "what time does the next train leave for the station",
)


def speak(library: ctypes.CDLL, voice: str, text: str, pitch: int) -> np.ndarray:
    """Return what espeak-ng says, float32 at 22,050 Hz brought to 16 kHz by linear interpolation."""
    heard: list[np.ndarray] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @kind
    def hear(values: object, count: int, _: object) -> int:
        if values and count > 0:
            heard.append(np.ctypeslib.as_array(values, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(hear)
    library.espeak_SetVoiceByName(voice.encode())
    library.espeak_SetParameter(3, pitch, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Synchronize()
    wave = np.concatenate(heard).astype(np.float32) / 32768
    places = np.arange(0, len(wave) - 1, 22_050 / RATE)
    return np.interp(places, np.arange(len(wave)), wave).astype(np.float32)


def speech(folder: Path, out: Path) -> None:
    """Write clips of speech and pauses in noise, and which chunks have speech."""
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    library.espeak_Initialize(2, 0, str(folder).encode(), 0)
    rng = np.random.default_rng(5)
    arrays = {}
    for number in range(CLIPS):
        parts, flags = [np.zeros(CHUNK * int(rng.integers(10, 40)), np.float32)], []
        for _ in range(3):
            said = speak(
                library, VOICES[number % len(VOICES)], SAID[int(rng.integers(len(SAID)))], int(rng.integers(30, 70))
            )
            parts += [said, np.zeros(CHUNK * int(rng.integers(20, 60)), np.float32)]
        clean = np.concatenate(parts)
        clean = clean[: len(clean) // CHUNK * CHUNK]
        loud = np.sqrt(np.square(clean.reshape(-1, CHUNK)).mean(1))
        flags = loud > 0.02 * loud.max()
        noise = rng.normal(size=len(clean)).astype(np.float32)
        if number % 3 == 1:
            noise = np.convolve(noise, np.ones(8) / 8, "same").astype(np.float32)
        if number % 3 == 2:
            noise = noise + 2 * np.sin(np.arange(len(clean)) * 2 * np.pi * rng.uniform(200, 900) / RATE).astype(
                np.float32
            )
        ratio = 10 ** (-rng.uniform(3, 15) / 20)
        noise *= ratio * np.sqrt(np.square(clean[np.repeat(flags, CHUNK)]).mean()) / np.sqrt(np.square(noise).mean())
        arrays[f"clip{number}"] = (clean + noise).astype(np.float32)
        arrays[f"flag{number}"] = flags
    np.savez(out / "speech.npz", **arrays)


def lines(corpus: Path, alphabet: list[str], out: Path) -> None:
    """Write images of text lines, (3, 48, width) in [-1, 1], and the indices of their characters."""
    rng = np.random.default_rng(9)
    words = re.findall(r"[A-Za-z]{4,12}", corpus.read_text(encoding="utf-8", errors="replace"))
    index = {character: position for position, character in enumerate(alphabet)}
    arrays = {}
    for number in range(LINES):
        text = words[int(rng.integers(len(words)))] + ("" if number % 3 else f"-{int(rng.integers(10, 9999))}")
        font = ImageFont.load_default(size=int(rng.integers(24, 34)))
        left, top, right, bottom = font.getbbox(text)
        image = Image.new("L", (int(right - left) + 24, 48), 255 - int(rng.integers(0, 40)))
        ImageDraw.Draw(image).text(
            (12 - left, (48 - (bottom - top)) / 2 - top), text, font=font, fill=int(rng.integers(0, 80))
        )
        image = image.rotate(float(rng.uniform(-1.5, 1.5)), fillcolor=235)
        value = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(2, 30), (48, image.width))
        arrays[f"image{number}"] = np.repeat((np.clip(value, 0, 255) / 127.5 - 1)[None], 3, 0).astype(np.float32)
        arrays[f"label{number}"] = np.array([index[character] for character in text], np.int64)
    np.savez(out / "lines.npz", **arrays)


def main() -> None:
    """Make both."""
    espeak, corpus, alphabet, out = (Path(text) for text in sys.argv[1:5])
    lines(corpus, alphabet.read_text(encoding="utf-8").split("\n"), out)
    speech(espeak, out)


if __name__ == "__main__":
    main()
