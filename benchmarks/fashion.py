"""A network and pictures in no config: Fashion-MNIST, and inverted residuals of 24 channels.

    python benchmarks/fashion.py <folder with the four idx files> <output folder>

writes pictures in folders by class and ``weights.pt``, and prints the commands of the rows in
``goal.csv``. The files are in Debian's package dataset-fashion-mnist. 10,000 pictures of the
training split are kept, of which archnet splits off 1,000 for validation.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from networks import fashion_net
from numpy.typing import NDArray
from PIL import Image
from torch import nn

KEPT = {"train": 10_000, "t10k": 10_000}
EPOCHS, BATCH = 6, 128
MEAN, STD = 0.2860, 0.3530


def main() -> None:
    """Write the pictures, train the network, and say what to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    for split, count in KEPT.items():
        images, labels = read(options.source, split)
        write(options.output / "data" / {"t10k": "test"}.get(split, split), images, labels, count)
    images, labels = read(options.source, "train")
    count = KEPT["train"]
    network = trained(images[:count], labels[:count])
    torch.save(network.state_dict(), options.output / "weights.pt")
    print(
        f"python train.py task=images task.data.root={options.output}/data teacher=custom "
        f"teacher.factory=benchmarks.networks:fashion_net "
        f"teacher.weights={options.output}/weights.pt task.data.channels=1 "
        f"task.data.image_size=28 task.data.mean=[{MEAN}] task.data.std=[{STD}] "
        "quant.bits=4 goal.drop=1.0"
    )


def read(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 28, 28) and labels (N,) of the idx files."""
    found = []
    for kind, skipped in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"{split}-{kind}-ubyte.gz") as file:
            found.append(np.frombuffer(file.read(), np.uint8, offset=skipped))
    return found[0].reshape(-1, 28, 28), found[1]


def write(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], count: int) -> None:
    """The first images as pictures in a folder for each class."""
    for number in range(count):
        place = folder / str(labels[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(place / f"{number:05d}.png")


def trained(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> nn.Module:
    """The network, trained on all of some images with a one-cycle rate."""
    torch.manual_seed(0)
    x = (torch.from_numpy(images.copy()).float()[:, None] / 255 - MEAN) / STD
    y = torch.from_numpy(labels.copy()).long()
    network, steps = fashion_net(), EPOCHS * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return network.eval()


if __name__ == "__main__":
    main()
