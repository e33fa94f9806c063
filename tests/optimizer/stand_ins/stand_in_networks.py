"""Functions as users write them for `export-torch`, over the stand-in's `torch`."""

from __future__ import annotations

import numpy as np
import torch

X = torch.Tensor(np.arange(6, dtype=np.float32).reshape(1, 6))


class Doubles(torch.nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Module()

    def forward(self, image):
        return image * self.factor


def doubles():
    return Doubles().eval(), X


def twice_named():
    return Doubles().eval(), [{"image": X}, (X * 3,)], ["scores"]


def trebles():
    module = Doubles().eval()
    module.factor = 3.0
    return module, X


def partly_training():
    module = Doubles().eval()
    module.inner.training = True
    return module, X


class Grows(Doubles):
    def forward(self, image):
        self.factor += 1.0
        return super().forward(image)


def random():
    return Grows().eval(), X


class OnlyOne(Doubles):
    def forward(self, image):
        if len(image) > 1:
            raise ValueError("one at a time")
        return super().forward(image)


def one_at_a_time():
    return OnlyOne().eval(), X


class Raises(Doubles):
    def forward(self, image):
        raise ZeroDivisionError("no such luck")


def raises():
    return Raises().eval(), X


def no_module():
    return 3


def no_tensor():
    return Doubles().eval(), 3


def unfit():
    return Doubles().eval(), {"picture": X}


def no_output():
    module = Doubles().eval()
    module.forward = lambda image: "words"
    return module, X


def sleeps():
    import time

    time.sleep(600)
