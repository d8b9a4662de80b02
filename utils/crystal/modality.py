"""The row of crystals in the table of modalities. Imports no torch."""

from utils.args.modality import Modality

CRYSTAL = Modality(name="crystal", samples="crystals", autoencoder="CrystalVAE")
