"""Puts torchvision in reach of stock `transformers`, where it is installed, before anything here imports the latter."""

from torchvision_for_tests import import_torchvision

import_torchvision()
