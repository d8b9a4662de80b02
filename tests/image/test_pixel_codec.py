"""The codec that leaves images as they are."""

import torch

from utils.image import codec as codecs
from utils.image.pixel_codec import PixelCodec


def test_codec_changes_nothing(tmp_path):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codec = codecs.load_vae("pixels")
    assert codecs.measure_shape(codec) == (3, 1)
    assert not codecs.has_posterior(codec)
    assert torch.equal(codecs.decode(codec, codecs.encode(codec, images)[0]), images)
    codec.save_pretrained(tmp_path / "vae")
    assert isinstance(codecs.load_vae(str(tmp_path)), PixelCodec)
