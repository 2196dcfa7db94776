"""The models of the built-in trainer.

Shape suffixes in this package: B batch, T tokens of a row, S tokens of the encoder's row, D model
width, H heads of queries, G heads of keys and values, K width of a head, F width of the
feed-forward block, V vocabulary.
"""

from trainer.model.decoder import Decoder
from trainer.model.encoder_decoder import EncoderDecoder
from trainer.model.hugging_face import HuggingFace
from trainer.model.positions import Rotary

__all__ = ["Decoder", "EncoderDecoder", "HuggingFace", "Rotary"]
