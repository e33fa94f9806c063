"""Notes with known pitch, synthesised: data for the `pitch` model (basic-pitch), labelled by construction.

Each sample is one window of the model (43,844 values at 22,050 Hz, 16-bit steps) with four notes in a row: eight
harmonics of random strength, an attack, a decay and a release, faint noise in half of the windows. A note is named
rightly if, over the middle of its time, the model's `note` output is highest at its pitch; the score of a window is the
share of its notes that are. This says how far a variant is from its source on clean tones, not how well the model does
on music.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wherry_optimizer import metrics
from wherry_optimizer.data import Dataset, Sample, Specification, Tensors
from wherry_shared.bundle import Interface

RATE_HZ = 22_050
WINDOW = 43_844
NOTES = 4
LOWEST_KEY = 21
"""MIDI number of the model's first pitch (A0)."""
LOW, HIGH = 40, 88
"""MIDI numbers between which notes are drawn: E2 to E6."""
HARMONICS = 8
NOISE = 0.002
OUTPUT = "note"


def window(rng: np.random.Generator, *, noise: bool) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Return one window, float32 (1, 43844, 1) in [-1, 1], and the MIDI numbers of its notes."""
    length = WINDOW // NOTES
    time = np.arange(length) / RATE_HZ
    signal = np.zeros(WINDOW)
    keys: list[int] = []
    for position in range(NOTES):
        key = int(rng.integers(LOW, HIGH, endpoint=True))
        base = 440.0 * 2.0 ** ((key - 69) / 12)
        tone = np.zeros(length)
        for harmonic in range(1, HARMONICS + 1):
            if base * harmonic < RATE_HZ / 2:
                strength = rng.uniform(0.3, 1.0) / harmonic**1.2
                tone += strength * np.sin(2 * np.pi * base * harmonic * time + rng.uniform(0, 2 * np.pi))
        envelope = (
            np.minimum(1, time / 0.01) * np.exp(-time * rng.uniform(0.5, 4)) * np.minimum(1, (time[-1] - time) / 0.03)
        )
        signal[position * length : (position + 1) * length] = (
            tone / np.abs(tone).max() * envelope * rng.uniform(0.1, 0.6)
        )
        keys.append(key)
    if noise:
        signal += rng.normal(0, NOISE, WINDOW)
    pcm = np.rint(np.clip(signal, -1, 1) * 32767) / 32768
    return pcm.astype(np.float32)[None, :, None], keys


def load(spec: Specification, interface: Interface, folder: Path) -> Dataset:
    """Synthesise calibration and evaluation windows from separate seeds; see the module's text."""
    del folder
    name = interface.inputs[0].name
    calibration = _windows(np.random.default_rng([spec.seed, 0]), spec.calibration, name)
    evaluation = _windows(np.random.default_rng([spec.seed, 1]), spec.evaluation, name)
    return Dataset(
        metric="notes_named",
        description="synthesised notes, labelled by construction",
        calibration=calibration,
        evaluation=evaluation,
        measure=metrics.Mean(named),
        notes={"notes": NOTES * (len(calibration) + len(evaluation))},
    )


def named(outputs: Tensors, keys: Sequence[int]) -> float:
    """Return the share of notes whose pitch is the highest in the middle of their time; outputs `note` (1, frames, 88)."""
    frames = outputs[OUTPUT][0]
    step = len(frames) / len(keys)
    right = 0
    for position, key in enumerate(keys):
        middle = frames[int(step * (position + 0.2)) : int(step * (position + 0.9))]
        right += int(middle.mean(axis=0).argmax()) + LOWEST_KEY == key
    return right / len(keys)


def _windows(rng: np.random.Generator, count: int, name: str) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    for number in range(count):
        values, keys = window(rng, noise=number % 2 == 1)
        samples.append(Sample({name: values}, keys))
    return tuple(samples)
