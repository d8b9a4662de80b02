"""The row of cells in the table of modalities. Imports no torch."""

from utils.args.modality import Modality

EXPRESSION = Modality(name="expression", samples="cells", autoencoder="ExpressionVAE")
