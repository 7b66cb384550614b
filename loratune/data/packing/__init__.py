"""Batching: rendered rows → tensors, padded or end to end.

`Batches` is what the trainer iterates; `why_not` says whether a model may be given rows end to end at all, and
`padding_is_cheaper` whether that takes longer.
"""

from loratune.data.packing.batches import Batches as Batches
from loratune.data.packing.batches import Packing as Packing
from loratune.data.packing.cost import padding_is_cheaper as padding_is_cheaper
from loratune.data.packing.flat import flatten as flatten
from loratune.data.packing.packing_check import why_not as why_not
from loratune.data.packing.packs import Packs as Packs
from loratune.data.packing.packs import best_fit as best_fit
from loratune.data.packing.padding import pad as pad
