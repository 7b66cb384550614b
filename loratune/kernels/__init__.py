"""Accelerated loss, LoRA, attention and norms for training, each with a reference in torch.

`accelerate` determines which layers of a model they can compute, and `Acceleration.applied` replaces these layers while
the model is trained. On a CPU, these are

- the loss, with logits only at supervised positions, computed in chunks;
- LoRA in the dtype of the base; A and B are float32, each split into its rounded value and the rounding error;
- queries, keys and values as one matrix product; attention over packed rows in tiles;
- norms, rotary embeddings and activations, each in one pass over memory.

Trained weights and optimizer states are float32.
"""

from loratune.kernels.acceleration import Acceleration as Acceleration
from loratune.kernels.acceleration import accelerate as accelerate
from loratune.kernels.acceleration import accelerated as accelerated
from loratune.kernels.acceleration import set_loss_targets as set_loss_targets
from loratune.kernels.acceleration import set_loss_weights as set_loss_weights
from loratune.kernels.acceleration import set_teacher as set_teacher
from loratune.kernels.acceleration import tree_refusal as tree_refusal
from loratune.kernels.compiled.fused_ops import notes as notes
from loratune.kernels.compiled.fused_ops import variant as variant
from loratune.kernels.gpu import compile_layers as compile_layers
from loratune.kernels.gpu import use_liger as use_liger
from loratune.kernels.gpu import uses_liger as uses_liger
from loratune.kernels.layer_sample import WHOLE_MODEL as WHOLE_MODEL
from loratune.kernels.layer_sample import LayerSample as LayerSample
from loratune.kernels.lora_linear import Adapted as Adapted
from loratune.kernels.lora_linear import InferenceLayers as InferenceLayers
from loratune.kernels.lora_linear import Reader as Reader
from loratune.kernels.lora_linear import RowsMixedError as RowsMixedError
from loratune.kernels.lora_linear import inference_lora as inference_lora
from loratune.kernels.loss import LossHead as LossHead
from loratune.kernels.loss import full_tensor as full_tensor
from loratune.kernels.loss import global_norm as global_norm
from loratune.kernels.loss import next_token_loss as next_token_loss
from loratune.kernels.loss import row_sums as row_sums
from loratune.kernels.loss import teacher_divergence as teacher_divergence
from loratune.kernels.loss_targets import row_counts as row_counts
from loratune.kernels.masks import sample_layers as sample_layers
from loratune.kernels.predictions import TeacherTargets as TeacherTargets
from loratune.kernels.predictions import dense_states as dense_states
from loratune.kernels.predictions import divergence as divergence
from loratune.kernels.predictions import logits_at as logits_at
from loratune.kernels.predictions import most_probable as most_probable
from loratune.kernels.predictions import next_token_logits as next_token_logits
from loratune.kernels.row_angles import crosses as crosses
from loratune.kernels.row_angles import length_limits as length_limits
from loratune.kernels.row_angles import use_row_angles as use_row_angles
from loratune.kernels.rowwise import attends_by_rows as attends_by_rows
from loratune.kernels.transfer import on_host as on_host
from loratune.kernels.transfer import send as send
from loratune.kernels.transfer import to_device as to_device
