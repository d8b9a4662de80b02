"""The row of images in the table of modalities. Imports no torch."""

from utils.args.modality import Modality

IMAGE = Modality(name="image", samples="images", autoencoder="")
