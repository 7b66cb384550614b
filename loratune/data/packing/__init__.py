"""Batching: rows of token ids → tensors, padded or end to end.

`BatchLayout` is what the trainer iterates; `packing_refusal` says whether a model may be given rows end to end at all,
and `padding_is_cheaper` whether that takes longer.
"""

from loratune.data.packing.batches import BatchLayout as BatchLayout
from loratune.data.packing.batches import Packing as Packing
from loratune.data.packing.batches import flatten as flatten
from loratune.data.packing.batches import pad as pad
from loratune.data.packing.packing_check import packing_refusal as packing_refusal
from loratune.data.packing.packing_check import padding_is_cheaper as padding_is_cheaper
from loratune.data.packing.packs import Packs as Packs
from loratune.data.packing.packs import best_fit as best_fit
